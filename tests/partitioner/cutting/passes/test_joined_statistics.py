"""A running statistic that a file stores together with a parameter is trained apart from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.bundles import Bundle
from splitonnx.errors import UnsupportedModel
from splitonnx.manifests import Role
from splitonnx.names import BatchNormMode, Target
from splitonnx.optimizers import SGD
from splitonnx.partitioner.cutting.passes.joined_statistics import (
    Separation,
    describe_separations,
    separate_statistics,
)
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from tests.support.case_trials import TARGETS
from tests.support.small_models import evaluate

Arrays = dict[str, np.ndarray]
RATE, STEPS = 0.2, 3
_RANDOM = np.random.default_rng(5)
DATA = {
    "x": _RANDOM.standard_normal((6, 4), np.float32),
    "labels": _RANDOM.standard_normal((6, 3), np.float32),
}
WEIGHTS = {
    "w": _RANDOM.standard_normal((4, 5), np.float32),
    "v": _RANDOM.standard_normal((5, 3), np.float32),
    "ones": np.ones(5, np.float32),
    "zeros": np.zeros(5, np.float32),
}
MEAN, VARIANCE = "n.running_mean", "n.running_var"


def normalize(out: str, *inputs: str, scope: str = "") -> onnx.NodeProto:
    """Make a BatchNormalization, which the dynamo exporter noted to be in a module."""
    node = helper.make_node("BatchNormalization", list(inputs), [out], name=out)
    if scope:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', '{scope}', 'bn']")
    return node


def build(nodes: Sequence[onnx.NodeProto], weights: Arrays, output: str = "y") -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "joined",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", None])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def build_joined() -> onnx.ModelProto:
    """One tensor is a bias, an offset and the mean; the other is the scale and the variance."""
    return build(
        [
            helper.make_node("Gemm", ["x", "w", "zeros"], ["h"], name="gemm"),
            normalize("n", "h", "ones", "zeros", "zeros", "ones"),
            helper.make_node("Relu", ["n"], ["r"], name="relu"),
            helper.make_node("MatMul", ["r", "v"], ["y"], name="product"),
        ],
        WEIGHTS,
    )


def separate(*nodes: onnx.NodeProto, **weights: np.ndarray) -> list[Separation]:
    """Separate the statistics of a model whose last node makes its output."""
    model = open_model(build(nodes, weights, nodes[-1].output[0]))
    return separate_statistics(model.graph)


def fill(*names: str, value: float = 1.0) -> Arrays:
    return {name: np.full(4, value, np.float32) for name in names}


def draw(*names: str) -> Arrays:
    return {name: np.linspace(0.5, 2, 4, dtype=np.float32) for name in names}


class Network:
    """The joined model as PyTorch would train it, with the formulas written out in float64."""

    def __init__(self, mode: BatchNormMode) -> None:
        self.is_training = mode == "train"
        self.weights = {name: array.astype(np.float64) for name, array in WEIGHTS.items()}
        self.mean, self.variance = np.zeros(5), np.ones(5)

    def step(self) -> float:
        x, labels = (DATA[name].astype(np.float64) for name in ("x", "labels"))
        w, v, scale, bias = (self.weights[name] for name in ("w", "v", "ones", "zeros"))
        h = x @ w + bias
        mean, variance = (h.mean(0), h.var(0)) if self.is_training else (self.mean, self.variance)
        deviation = np.sqrt(variance + 1e-5)
        normal = (h - mean) / deviation
        n = normal * scale + bias
        r = np.maximum(n, 0)
        y = r @ v
        from_y = 2 * (y - labels) / y.size
        from_n = from_y @ v.T * (n > 0)
        from_h = from_n * scale / deviation
        if self.is_training:
            own = from_n.mean(0) + normal * (from_n * normal).mean(0)
            from_h = (from_n - own) * scale / deviation
            self.mean = 0.9 * self.mean + 0.1 * mean
            self.variance = 0.9 * self.variance + 0.1 * variance
        gradients = {
            "w": x.T @ from_h,
            "v": r.T @ from_y,
            "ones": (from_n * normal).sum(0),
            "zeros": from_n.sum(0) + from_h.sum(0),  # the two remain one parameter
        }
        for name, gradient in gradients.items():
            self.weights[name] = self.weights[name] - RATE * gradient
        return float(((y - labels) ** 2).mean())

    def predict(self) -> np.ndarray:
        scale, bias = self.weights["ones"], self.weights["zeros"]
        normal = (DATA["x"] @ self.weights["w"] + bias - self.mean) / np.sqrt(self.variance + 1e-5)
        found: np.ndarray = np.maximum(normal * scale + bias, 0) @ self.weights["v"]
        return found


def list_roles(bundle: Bundle) -> dict[str, Role]:
    return {
        spec.tensor.name: spec.role
        for party in bundle.parties.values()
        for spec in party.manifest.state
        if spec.role is not Role.OPTIMIZER
    }


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("target", TARGETS)
def test_several_steps_train_parameters_and_statistics_apart(
    target: Target, mode: BatchNormMode
) -> None:
    bundle = cut(
        build_joined(), at=None, loss="mse", optimizer=SGD(lr=RATE), batchnorm=mode,
        client_target=target,
    )  # fmt: skip
    network = Network(mode)
    with Client(bundle.client, None, threads=1, seed=0) as client:
        for _ in range(STEPS):
            assert float(client.step(DATA)["loss"]) == pytest.approx(network.step(), rel=1e-4)
        found = client.state()
        predicted = client.predict({"x": DATA["x"]})["y"]
    expected = network.weights | {MEAN: network.mean, VARIANCE: network.variance}
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(predicted, network.predict(), rtol=1e-3, atol=1e-4)


def test_the_merged_model_is_the_model_given_with_two_tensors_more() -> None:
    bundle = cut(build_joined(), at="r", loss="mse", batchnorm="train")
    merged = onnx.load_from_string(merge(bundle))
    onnx.checker.check_model(merged, full_check=True)
    names = {tensor.name for tensor in merged.graph.initializer}
    assert names == {*WEIGHTS, MEAN, VARIANCE}
    x = {"x": DATA["x"]}
    found, expected = evaluate(merged, x)["y"], evaluate(build_joined(), x)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_cut_says_which_tensors_are_kept_apart(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="splitonnx"):
        cut(build_joined(), at=None, loss="mse")
    assert (
        f"'ones', also the running variance of 'n', as '{VARIANCE}'; "
        f"'zeros', also the running mean of 'n', as '{MEAN}'"
    ) in caplog.text


def test_patterns_find_the_parameter_or_the_statistic() -> None:
    roles = list_roles(cut(build_joined(), at=None, loss="mse", batchnorm="train", freeze=["ones"]))
    assert (roles["ones"], roles[VARIANCE]) == (Role.FROZEN, Role.BUFFER)
    by_new_name = {"running_var$": "train"}
    roles = list_roles(cut(build_joined(), at=None, loss="mse", batchnorm=by_new_name))  # type: ignore[arg-type]
    assert (roles["ones"], roles[VARIANCE]) == (Role.PARAMETER, Role.BUFFER)


def test_a_pattern_with_the_name_of_a_bias_finds_no_normalization() -> None:
    model = build_joined()
    model.graph.node[1].input[2] = "offset"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(5, np.float32), "offset"))
    with pytest.raises(UnsupportedModel, match="matches no BatchNormalization"):
        cut(model, at=None, loss="mse", batchnorm={"^zeros$": "train"})


def test_a_statistic_is_named_as_in_the_network_if_its_module_is_known() -> None:
    tensors = fill("bn.weight", "bn.bias", "other.weight")
    by_scale = normalize("n", "x", "bn.weight", "bn.bias", "bn.bias", "bn.weight")
    assert [one.name for one in separate(by_scale, **tensors)] == [
        "bn.running_var",
        "bn.running_mean",
    ]
    by_note = normalize("n", "x", "other.weight", "bn.bias", "bn.bias", "bn.weight", scope="norm")
    assert [one.name for one in separate(by_note, **tensors)] == ["norm.running_mean"]


def test_an_identity_with_the_name_of_the_statistic_gives_way_to_it() -> None:
    renamed = helper.make_node("Identity", ["s"], ["bn.running_var"], name="i")
    node = normalize("n", "x", "s", "b", "m", "bn.running_var")
    model = open_model(build([renamed, node], fill("s", "b", "m"), "n"))
    (found,) = separate_statistics(model.graph)
    assert (found.name, found.source) == ("bn.running_var", "s")
    assert [each.op_type for each in model.graph] == ["BatchNormalization"]


def test_a_mean_and_a_variance_in_one_tensor_become_two() -> None:
    (found,) = separate(normalize("n", "x", "s", "b", "same", "same"), **draw("s", "b", "same"))
    assert (found.name, found.source, found.is_trained) == (VARIANCE, "same", False)
    assert "another statistic and the running variance of 'n'" in describe_separations([found])


def test_a_module_that_is_called_twice_keeps_its_statistics() -> None:
    twice = [normalize(out, x, "s", "b", "m", "v") for x, out in (("x", "h"), ("h", "n"))]
    assert separate(*twice, **fill("s", "b", "m", "v")) == []
    for node in twice:
        node.input[4] = "s"
    (found,) = separate(*twice, **fill("s", "b", "m"))
    assert (found.nodes, found.name) == (("h", "n"), "h.running_var")


def test_statistics_of_two_modules_are_kept_apart_unless_they_are_hardly_equal_by_chance() -> None:
    nodes = [
        normalize("h", "x", "s1", "b", "m1", "v"),
        normalize("n", "h", "s2", "b", "m2", "v"),
    ]
    (found,) = separate(*nodes, **fill("s1", "s2", "b", "m1", "m2", "v"))
    assert (found.name, found.nodes) == (VARIANCE, ("n",))
    assert separate(*nodes, **draw("s1", "s2", "b", "m1", "m2", "v")) == []


def test_the_exporter_s_notes_tell_two_modules_with_equal_tensors() -> None:
    nodes = [
        normalize("h", "x", "s", "b", "m", "v", scope="one"),
        normalize("n", "h", "s", "b", "m", "v", scope="two"),
    ]
    found = separate(*nodes, **draw("s", "b", "m", "v"))
    assert [one.name for one in found] == ["two.running_mean", "two.running_var"]


def test_arithmetic_that_reads_a_true_statistic_leaves_it_as_it_is() -> None:
    nodes = [
        helper.make_node("Add", ["v", "small"], ["moved"], name="add"),
        helper.make_node("Sqrt", ["moved"], ["deviation"], name="sqrt"),
        helper.make_node("Mul", ["x", "deviation"], ["h"], name="mul"),
        helper.make_node("Sub", ["h", "m"], ["centred"], name="sub"),
        normalize("n", "centred", "s", "b", "m", "v"),
    ]
    assert separate(*nodes, **draw("s", "b", "m", "v", "small")) == []


def test_a_name_that_is_taken_gets_a_number() -> None:
    node = normalize("n", "x", "s", "b", "m", "s")
    other = helper.make_node("Add", ["n", VARIANCE], ["y"], name="add")
    (found,) = separate(node, other, **fill("s", "b", "m", VARIANCE))
    assert found.name == f"{VARIANCE}.2"


@pytest.mark.parametrize("changed", ["Identity", "Reshape", "Cast"])
def test_a_statistic_that_is_renamed_or_reshaped_is_never_trained_by_gradients(
    changed: str,
) -> None:
    model = build_joined()
    inputs = ["mean", "shape"] if changed == "Reshape" else ["mean"]
    made = helper.make_node(changed, inputs, ["m"], name="made")
    if changed == "Cast":
        made.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    model.graph.node.insert(0, made)
    model.graph.node[2].input[3] = "m"
    for name, array in {
        "mean": draw("mean")["mean"][[0, 1, 2, 3, 3]],
        "shape": np.array([5]),
    }.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    assert list_roles(cut(model, at=None, loss="mse"))["mean"] is Role.FROZEN
    if changed == "Identity":
        roles = list_roles(cut(model, at=None, loss="mse", batchnorm="train"))
        assert roles["mean"] is Role.BUFFER
