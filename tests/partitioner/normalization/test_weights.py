"""Which stored tensors are trained, wherever they stand, and what --train and --freeze change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from splitonnx.bundles import Bundle
from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.verifications import leave_whole, verify
from tests.support.zoo import FLOAT, ZOO, Net

RANDOM = np.random.default_rng(4)


def list_roles(bundle: Bundle) -> dict[str, str]:
    states = [s for p in bundle.parties.values() for s in p.manifest.state]
    return {s.tensor.name: str(s.role) for s in states if s.role != "optimizer"}


def list_trained(bundle: Bundle) -> set[str]:
    return {name for name, role in list_roles(bundle).items() if role == "parameter"}


def move_to_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write every initializer as a Constant node, as Paddle's exporter does."""
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in moved.graph.initializer]
    del moved.graph.initializer[:]
    nodes.extend(moved.graph.node)
    del moved.graph.node[:]
    moved.graph.node.extend(nodes)
    return moved


@pytest.mark.parametrize("name", ["attention", "batchnorm_trained", "chain", "embedding"])
def test_weights_in_constant_nodes_train_as_initializers_do(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    moved = move_to_constants(model)
    at = entry.several or "act1" if name != "embedding" else "mean"
    bundle, expected = cut(moved, at=at), cut(model, at=at)
    assert list_roles(bundle) == list_roles(expected)
    assert list_trained(bundle)
    data = entry.data(16)
    verification = verify(bundle, data, steps=2, batch_size=8)
    reference = verify(expected, data, steps=2, batch_size=8)
    assert verification.largest_difference == reference.largest_difference
    assert verification.steps[-1].split_loss == reference.steps[-1].split_loss
    merged = onnxruntime.InferenceSession(merge(bundle))
    assert [v.name for v in merged.get_inputs()] == list(entry.inputs)


def build_elementwise(
    kind: str, values: Sequence[float], *, literal: bool = False
) -> onnx.ModelProto:
    """A layer, an elementwise operator with a stored tensor, and another layer."""
    net = Net()
    stored = np.array(values, np.float32)
    value = net.op("MatMul", "x", net.weight("w1", 4, 4), out="m1")
    value = net.op("Tanh", value, out="t1")
    if literal:
        net.nodes.append(
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(stored))
        )
    else:
        net.constant("c", stored)
    value = net.op(kind, value, "c", out="changed")
    output = net.op("MatMul", value, net.weight("w2", 4, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 4])}, output, 3)


FOUR = [0.1, 0.7, -0.3, 1.4]


@pytest.mark.parametrize(
    ("kind", "values", "literal", "trained"),
    [
        ("Add", FOUR, False, True),
        ("Add", FOUR, True, True),
        ("Mul", FOUR, True, True),
        ("Sub", FOUR, False, True),
        ("Sub", FOUR, True, False),  # the mean of the data, say
        ("Div", FOUR, True, False),
        ("Add", [0, 0, 0, 0], False, True),  # a bias at its start
        ("Mul", [1, 1, 1, 1], True, True),  # a scale at its start
        ("Add", [0, 1, 2, 3], False, False),  # a grid
        ("Add", [0, -np.inf, 0, 0], False, False),  # a mask
        ("Add", [1e-5], False, False),
        ("Mul", [0.5], True, False),
        ("PRelu", FOUR, True, True),
        ("PRelu", [0.25], False, True),
        ("Pow", [2.0], False, False),
    ],
)
def test_what_is_trained_follows_from_use(
    kind: str, values: list[float], literal: bool, trained: bool
) -> None:
    model = build_elementwise(kind, values, literal=literal)
    assert list_trained(cut(model, at=None)) == {"w1", "w2"} | ({"c"} if trained else set())


def test_statistics_of_a_frozen_batchnorm_are_not_trained() -> None:
    bundle = cut(ZOO["batchnorm_frozen"].build(), at=None)
    roles = list_roles(bundle)
    assert {roles[f"{norm}.bn.{kind}"] for norm in ("n1", "n2") for kind in ("mean", "var")} == {
        "frozen"
    }


def test_the_bias_of_a_single_output_is_trained() -> None:
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 1), out="m")
    output = net.op("Add", value, net.constant("b", np.array([0.5], np.float32)), out="y")
    model = net.finish({"x": (FLOAT, ["N", 4])}, output, 1)
    assert list_trained(cut(model, at=None, loss="mse")) == {"w", "b"}


def test_a_weight_behind_a_change_of_shape_is_trained() -> None:
    net = Net()
    net.nodes.append(
        helper.make_node(
            "Constant", [], ["w"],
            value=numpy_helper.from_array(RANDOM.standard_normal((3, 4), np.float32)),
        )
    )  # fmt: skip
    output = net.op("MatMul", "x", net.op("Transpose", "w", out="turned"), out="y")
    model = net.finish({"x": (FLOAT, ["N", 4])}, output, 3)
    assert list_trained(cut(model, at=None)) == {"w"}


def build_scaled() -> onnx.ModelProto:
    """A network with a scalar, a constant, a setting and running statistics."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("head.w", 4, 4), out="m1")
    value = net.batchnorm(value, 4, out="n1", training=False)
    pads = net.constant("pads", np.zeros(4, np.int64))
    fill = net.constant("fill", np.array(-2, np.float32))
    value = net.op("Pad", value, pads, fill, out="padded")
    value = net.op("Mul", value, net.constant("temperature", np.array(0.5, np.float32)), out="warm")
    value = net.op("Add", value, net.constant("offset", np.array([0.1], np.float32)), out="moved")
    output = net.op("MatMul", value, net.weight("tail.w", 4, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 4])}, output, 3)


DATA: dict[str, np.ndarray] = {
    "x": RANDOM.standard_normal((16, 4)).astype(np.float32),
    "labels": RANDOM.integers(0, 3, 16),
}


def test_train_makes_parameters_of_constants() -> None:
    bundle = cut(build_scaled(), at="m1", tail_at="moved", train=["^temperature$", "offset"])
    assert list_trained(bundle) >= {"temperature", "offset", "head.w", "tail.w"}
    assert verify(bundle, DATA, steps=3, batch_size=8).largest_difference == 0.0
    assert bundle.server is not None
    assert bundle.server.weights["temperature"].shape == ()
    merged = onnx.load_from_string(merge(bundle))
    assert {"temperature", "offset"} <= {t.name for t in merged.graph.initializer}


def test_train_names_what_is_left_when_all_is_frozen() -> None:
    bundle = cut(build_scaled(), at="m1", freeze=["."], train=[r"^tail\."])
    assert list_trained(bundle) == {"tail.w"}
    assert list_trained(leave_whole(bundle)) == {"tail.w"}
    assert verify(bundle, DATA, steps=2, batch_size=8).largest_difference == 0.0


def test_train_means_parameters_before_constants() -> None:
    """A layer's name finds the epsilons and exponents in it, too."""
    assert "offset" not in list_trained(cut(build_scaled(), at=None, train=["o|w"], freeze=["."]))


@pytest.mark.parametrize(
    ("train", "freeze", "sentence"),
    [
        (["fill"], [], r"--train fill: 'fill': it is a setting of node 'padded_node' \(Pad\)"),
        ([r"n1\.bn\.mean"], [], "'n1.bn.mean': it is a running statistic"),
        (["tail.x"], [], r"--train tail\.x: no parameter's name .* did you mean 'tail\.w'"),
        ([], ["haed.w"], r"--freeze haed\.w: no parameter's name .* did you mean 'head\.w'"),
        (["("], [], r"--train \( is not a regular expression"),
        (["head"], [r"head\.w"], r"--freeze head\\\.w freezes nothing: --train trains all"),
    ],
)
def test_a_pattern_without_effect_is_refused(
    train: list[str], freeze: list[str], sentence: str
) -> None:
    with pytest.raises((UnsupportedModel, UsageError), match=sentence):
        cut(build_scaled(), at=None, train=train, freeze=freeze)


def build_branch(condition: str, *, noisy: bool = False) -> onnx.ModelProto:
    """A layer in a branch: of a known condition, or of one that depends on the data.

    ``noisy`` means that the branches draw random numbers, so that no gradient can pass through.
    """
    branches = {}
    noise = [helper.make_node("RandomNormalLike", ["x"], ["noise"])] if noisy else []
    for name, seed in (("then", 1), ("else", 2)):
        weight = np.random.default_rng(seed).standard_normal((4, 4), np.float32)
        product = helper.make_node("MatMul", ["x", "inner"], [f"{name}_out"], name=f"{name}_node")
        branches[f"{name}_branch"] = helper.make_graph(
            [*noise, product],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", FLOAT, ["N", 4])],
            [numpy_helper.from_array(weight, "inner")],
        )
    net = Net()
    net.constant("yes", np.array(True))
    zero = net.constant("zero", np.array(0, np.float32))
    net.op("Greater", net.op("ReduceMax", "x", out="top", keepdims=0), zero, out="any")
    net.op("If", condition, out="chosen", **branches)
    output = net.op("MatMul", "chosen", net.weight("w", 4, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 4])}, output, 3)


def test_weights_of_a_settled_branch_are_trained() -> None:
    bundle = cut(build_branch("yes"), at="chosen")
    assert list_trained(bundle) == {"chosen_node/inner", "w"}  # each branch has its "inner"
    assert verify(bundle, DATA, steps=2, batch_size=8).largest_difference == 0.0


@pytest.mark.parametrize("noisy", [False, True])
def test_weights_of_a_branch_that_depends_on_the_data_are_trained_where_they_can(
    noisy: bool,
) -> None:
    model = build_branch("any", noisy=noisy)
    bundle = cut(model, at="chosen")
    held = set() if noisy else {"chosen_node/inner", "inner"}
    assert list_trained(bundle) == {"w", *held}
    assert verify(bundle, DATA, steps=2, batch_size=8).largest_difference == 0.0
    assert check(model).conditional == (2 * 4 * 4 if noisy else 0)
    inputs = {"x": DATA["x"]}
    original = onnxruntime.InferenceSession(model.SerializeToString())
    merged = onnxruntime.InferenceSession(merge(bundle))
    np.testing.assert_array_equal(merged.run(None, inputs)[0], original.run(None, inputs)[0])


def test_a_pattern_of_what_is_trained_anyway_is_said_to_have_no_effect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The user may believe that nothing else is trained."""
    model = ZOO["chain"].build()
    cut(model, at=None, train=["w1"], freeze=["."])
    cut(model, at=None, train=["w1"], freeze=["w[12]"])
    assert not caplog.records
    cut(model, at=None, train=["w1"])
    (record,) = caplog.records
    assert record.getMessage().startswith("--train w1 has no effect: 'w1' would be trained without")


def test_a_pattern_that_freezes_what_training_updates_is_refused() -> None:
    norms = ZOO["batchnorm_trained"].build()
    statistic = next(n for node in norms.graph.node for n in node.input if n.endswith(".mean"))
    with pytest.raises(UsageError, match="are running statistics, which training updates"):
        cut(norms, at=None, freeze=[statistic])
    cut(norms, at=None, freeze=[statistic], batchnorm="frozen")
