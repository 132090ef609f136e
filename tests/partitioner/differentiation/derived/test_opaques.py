"""What lies before every trained parameter is run as it stands, whatever is differentiated behind.

Each model computes features ``f`` (N, 4) from ``h`` (N, 4) by frozen operators, and scores from
these by the only trained weight, so that its gradient tells the features' values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from splitonnx.bundles import Bundle
from splitonnx.errors import NotDifferentiable
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.partitioner.rewrites.test_recurrences import GATES, evaluate
from tests.support.case_trials import STEP, TARGETS, run_step
from tests.support.zoo import FLOAT, INT64, Net

BOOL = TensorProto.BOOL

RANDOM = np.random.default_rng(4)
X = RANDOM.standard_normal((6, 4)).astype(np.float32) * 2 + 1
LABELS = RANDOM.standard_normal((6, 3)).astype(np.float32)


def recur(kind: str, **attributes: Any) -> Callable[[Net], None]:
    """Return the last state of a recurrence over three steps, which start from other states."""

    def write(net: Net) -> None:
        gates = GATES[kind] * 4
        net.op("Unsqueeze", "h", net.constant("first", np.array([0])), out="row")
        net.op("Concat", "row", "row", "row", out="steps", axis=0)
        names = ["steps", net.weight("weights", 1, gates, 4), net.weight("own", 1, gates, 4)]
        names += [net.weight("bias", 1, 2 * gates), "", "row", *(["row"] if kind == "LSTM" else [])]
        names += [net.weight("peepholes", 1, 12)] if kind == "LSTM" else []
        node = helper.make_node(
            kind, names, ["", "state"], name="recurrence", hidden_size=4, **attributes
        )
        net.nodes.append(node)
        net.op("Squeeze", "state", "first", out="f")

    return write


def branch(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    """Make a body of If; its nodes read what they like of the graph around it."""
    name = nodes[-1].output[0]
    result = helper.make_tensor_value_info(name, FLOAT, ["N", 4])
    return helper.make_graph(nodes, "branch", [], [result])


def choose(make: Callable[[str], onnx.GraphProto]) -> Callable[[Net], None]:
    """Return what one of two equal branches gives; which, the data say."""

    def write(net: Net) -> None:
        for name, low, high in [("scale", 0.5, 2), ("bias", -1, 1), ("mean", -2, 3), ("var", 1, 4)]:
            net.constant(name, np.linspace(low, high, 4, dtype=np.float32))
        net.constant("weights", np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 16, 4))
        net.constant("own", np.linspace(1, -1, 64, dtype=np.float32).reshape(1, 16, 4))
        net.constant("step", np.array(0.05, np.float32))
        net.constant("zero", np.array(90, np.uint8))
        net.constant("first", np.array([0]))
        net.op("Tanh", "h", out="bent")  # only the branches read it
        net.op("ReduceMax", "h", out="top", keepdims=0)
        net.op("Greater", "top", net.constant("none", np.array(0, np.float32)), out="hot")
        net.op("If", "hot", out="f", then_branch=make("then"), else_branch=make("else"))

    return write


def normalize(prefix: str) -> onnx.GraphProto:
    inputs = ["bent", "scale", "bias", "mean", "var"]
    return branch(helper.make_node("BatchNormalization", inputs, [f"{prefix}.f"]))


def remember(prefix: str) -> onnx.GraphProto:
    names = [f"{prefix}.{name}" for name in ("row", "state", "f")]
    return branch(
        helper.make_node("Unsqueeze", ["bent", "first"], names[:1]),
        helper.make_node("LSTM", [names[0], "weights", "own"], ["", names[1]], hidden_size=4),
        helper.make_node("Squeeze", [names[1], "first"], names[2:]),
    )


def quantize(prefix: str) -> onnx.GraphProto:
    inner = f"{prefix}.q"
    return branch(
        helper.make_node("QuantizeLinear", ["bent", "step", "zero"], [inner]),
        helper.make_node("DequantizeLinear", [inner, "step", "zero"], [f"{prefix}.f"]),
    )


def loop(net: Net) -> None:
    """Normalize as often as the largest element says, each time what the last time gave."""
    for name in ("scale", "bias", "mean", "var"):
        net.constant(name, np.linspace(0.5, 1.5, 4, dtype=np.float32))
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node(
                "BatchNormalization", ["old", "scale", "bias", "mean", "var"], ["new"]
            ),
            helper.make_node("Identity", ["on"], ["again"]),
        ],
        "body",
        [value("i", INT64, []), value("on", BOOL, []), value("old", FLOAT, ["N", 4])],
        [value("again", BOOL, []), value("new", FLOAT, ["N", 4])],
    )
    net.op("ReduceMax", "h", out="top", keepdims=0)
    net.op("Cast", "top", out="trips", to=INT64)
    net.op("Loop", "trips", net.constant("yes", np.array(True)), "h", out="looped", body=body)
    net.op("Reshape", "looped", net.constant("shape", np.array([-1, 4])), out="f")


def two_branches(net: Net) -> None:
    """One If reads what another made, and each what lies between."""
    choose(normalize)(net)
    net.nodes[-1].output[0] = "g"
    net.op("Add", "g", "bent", out="sum")
    inner = branch(helper.make_node("Mul", ["g", "sum"], ["then.product"]))
    other = branch(helper.make_node("Sub", ["sum", "g"], ["else.rest"]))
    net.op("If", "hot", out="f", then_branch=inner, else_branch=other)


def make_sequence(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_sequence_value_info(name, FLOAT, None)


def collect(net: Net) -> None:
    """Join the states of a Loop that runs as often as the largest element says."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Cast", ["i"], ["number"], to=FLOAT),
            helper.make_node("Add", ["h", "number"], ["piece"]),
            helper.make_node("SequenceInsert", ["old", "piece"], ["new"]),
            helper.make_node("Identity", ["on"], ["again"]),
        ],
        "body",
        [value("i", INT64, []), value("on", BOOL, []), make_sequence("old")],
        [value("again", BOOL, []), make_sequence("new")],
    )
    net.op("ReduceMax", "h", out="top", keepdims=0)
    net.op("Cast", "top", out="trips", to=INT64)
    net.op("SequenceConstruct", "h", out="start")
    net.op("Loop", "trips", net.constant("yes", np.array(True)), "start", out="pieces", body=body)
    net.op("ConcatFromSequence", "pieces", out="stacked", axis=0, new_axis=1)
    net.op("ReduceSum", "stacked", net.constant("first", np.array([0])), out="sum", keepdims=0)
    net.op("Reshape", "sum", net.constant("shape", np.array([-1, 4])), out="f")


def choose_sequence(net: Net) -> None:
    """Take the last of the tensors that one of two branches lists."""

    def list_tensors(*names: str) -> onnx.GraphProto:
        result = f"{'.'.join(names)}.listed"
        node = helper.make_node("SequenceConstruct", names, [result])
        return helper.make_graph([node], "branch", [], [make_sequence(result)])

    net.op("Tanh", "h", out="bent")
    net.op("ReduceMax", "h", out="top", keepdims=0)
    net.op("Greater", "top", net.constant("none", np.array(0, np.float32)), out="hot")
    both, one = list_tensors("h", "bent"), list_tensors("h")
    net.op("If", "hot", out="listed", then_branch=both, else_branch=one)
    net.op("SequenceAt", "listed", net.constant("last", np.array(-1)), out="taken")
    net.op("Reshape", "taken", net.constant("shape", np.array([-1, 4])), out="f")


def split_by_data(net: Net) -> None:
    """Split along the samples, in a place that the data say, and turn the parts around."""
    net.op("ReduceMax", "h", out="top", keepdims=1)
    net.op("Greater", "top", net.constant("none", np.array(0, np.float32)), out="hot")
    net.op("Cast", "hot", out="one", to=INT64)
    net.op("Reshape", "one", net.constant("flat", np.array([1])), out="one.flat")
    net.op("Shape", "h", out="size", start=0, end=1)
    net.op("Sub", "size", "one.flat", out="rest")
    net.op("Concat", "one.flat", "rest", out="lengths", axis=0)
    net.op("SplitToSequence", "h", "lengths", out="parts", axis=0)
    for index in (0, 1):
        net.op("SequenceAt", "parts", net.constant(f"at{index}", np.array(index)), out=f"p{index}")
    net.op("Concat", "p1", "p0", out="turned", axis=0)
    net.op("Reshape", "turned", net.constant("shape", np.array([-1, 4])), out="f")


def wrap(net: Net) -> None:
    """Wrap a value as an optional one, and take it out again."""
    net.op("Tanh", "h", out="bent")
    net.op("Optional", "bent", out="wrapped")
    net.op("OptionalGetElement", "wrapped", out="f")


CASES: Mapping[str, Callable[[Net], None]] = {
    "GRU": recur("GRU"),
    "GRU whose reset is linear": recur("GRU", linear_before_reset=1),
    "LSTM": recur("LSTM"),
    "RNN": recur("RNN"),
    "If around BatchNormalization": choose(normalize),
    "If around LSTM": choose(remember),
    "If around quantization": choose(quantize),
    "If that reads an If": two_branches,
    "Loop around BatchNormalization": loop,
    "Loop that carries a sequence": collect,
    "If whose branches make sequences": choose_sequence,
    "sequence of parts as long as the data say": split_by_data,
}


def build(write: Callable[[Net], None], output: str = "scores") -> onnx.ModelProto:
    net = Net(opset=20)
    net.op("MatMul", "x", net.weight("frozen", 4, 4), out="h")
    write(net)
    net.op("MatMul", "f", net.weight("w", 4, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 4])}, output, 4 if output == "f" else 3)


def divide(model: onnx.ModelProto, at: str | None, target: Target) -> Bundle:
    return cut(model, at=at, loss="mse", client_target=target, server_target=target,
               train=["^w$"], freeze=["."])  # fmt: skip


def evaluate_onnx(model: onnx.ModelProto, output: str) -> np.ndarray:
    """Return what onnx's own evaluator does."""
    results = ReferenceEvaluator(model).run([output], {"x": X})
    assert isinstance(results, list)
    return np.asarray(results[0])


def expect_gradient(model: onnx.ModelProto, features: np.ndarray) -> np.ndarray:
    """d mean((f w - labels)^2) / d w."""
    (weight,) = (t for t in model.graph.initializer if t.name == "w")
    distance = features @ onnx.numpy_helper.to_array(weight) - LABELS
    gradient: np.ndarray = features.T @ distance * (2 / LABELS.size)
    return gradient


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_frozen_features_are_those_that_onnx_defines(case: str, target: Target) -> None:
    model = build(CASES[case])
    features = evaluate_onnx(build(CASES[case], "f"), "f")
    found = run_step(divide(model, None, target), {"x": X, "labels": LABELS})
    expected = expect_gradient(model, features)
    np.testing.assert_allclose(found["w_grad"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("at", ["h", "f"])
@pytest.mark.parametrize("case", CASES)
def test_either_party_holds_frozen_features(case: str, at: str, target: Target) -> None:
    bundle = divide(build(CASES[case]), at, target)
    assert verify(bundle, {"x": X, "labels": LABELS}, batch_size=3).largest_difference == 0.0


@pytest.mark.parametrize("target", TARGETS)
def test_a_frozen_optional_value_is_what_was_put_into_it(target: Target) -> None:
    model = build(wrap)  # which onnx's own evaluator cannot run
    (frozen,) = (t for t in model.graph.initializer if t.name == "frozen")
    features = np.tanh(X @ onnx.numpy_helper.to_array(frozen))
    found = run_step(divide(model, None, target), {"x": X, "labels": LABELS})
    expected = expect_gradient(model, features)
    np.testing.assert_allclose(found["w_grad"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["SequenceConstruct", "SplitToSequence"])
def test_a_sequence_between_a_trained_weight_and_the_loss_is_refused_by_its_node(
    kind: str,
) -> None:
    case = {"SequenceConstruct": collect, "SplitToSequence": split_by_data}[kind]
    with pytest.raises(NotDifferentiable, match=rf"\({kind}\) is between a trainable parameter"):
        cut(build(case), at=None, loss="mse")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", GATES)
def test_a_frozen_recurrence_of_two_directions_and_unequal_lengths_is_right(
    kind: str, target: Target
) -> None:
    net, gates = Net(opset=20), GATES[kind] * 2
    steps = RANDOM.standard_normal((5, 6, 3)).astype(np.float32)
    lengths = np.array([5, 1, 3, 2, 5, 4], np.int32)
    names = ["x", net.weight("weights", 2, gates, 3), net.weight("own", 2, gates, 2)]
    names += [net.weight("bias", 2, 2 * gates), net.constant("lens", lengths)]
    made = helper.make_node(kind, names, ["", "state"], name="recurrence", hidden_size=2,
                            direction="bidirectional")  # fmt: skip
    net.nodes.append(made)
    net.op("Transpose", "state", out="turned", perm=[1, 0, 2])
    net.op("Flatten", "turned", out="f")
    net.op("MatMul", "f", net.weight("w", 4, 3), out="scores")
    model = net.finish({"x": (FLOAT, [5, 6, 3])}, "scores", 3)

    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    arrays = {"w": stored["weights"], "r": stored["own"], "b": stored["bias"], "lens": lengths}
    state = evaluate(kind, {"direction": "bidirectional"}, {"x": steps, **arrays})["yh"]
    features = state.transpose(1, 0, 2).reshape(6, 4).astype(np.float32)
    found = run_step(divide(model, None, target), {"x": steps, "labels": LABELS})
    expected = expect_gradient(model, features)
    np.testing.assert_allclose(found["w_grad"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["GRU", "LSTM", "RNN"])
def test_a_recurrence_that_no_gradient_passes_stays_one_node(case: str) -> None:
    graph = onnx.load_from_string(divide(build(CASES[case]), None, "training").client.graphs[STEP])
    assert [node.op_type for node in graph.graph.node if node.name == "recurrence"] == [case]


def test_a_branch_that_trained_values_choose_gives_frozen_features() -> None:
    """No gradient passes a condition, so the If behind trained parameters stays, too."""
    net = Net(opset=20)
    net.op("MatMul", "x", net.weight("w", 4, 3), out="product")
    net.op("ReduceMax", "product", out="top", keepdims=0)
    net.op("Greater", "top", net.constant("none", np.array(0, np.float32)), out="hot")
    stored = [net.constant(f"{name}.row", RANDOM.standard_normal(3).astype(np.float32))
              for name in ("then", "else")]  # fmt: skip
    results = [helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, [3])
               for name in stored]  # fmt: skip
    bodies = [helper.make_graph([helper.make_node("Neg", [name], [f"{name}.out"])], name, [], [r])
              for name, r in zip(stored, results, strict=True)]  # fmt: skip
    net.op("If", "hot", out="row", then_branch=bodies[0], else_branch=bodies[1])
    net.op("Add", "product", "row", out="scores")
    model = net.finish({"x": (FLOAT, ["N", 4])}, "scores", 3)
    found = run_step(divide(model, None, "training"), {"x": X, "labels": LABELS})
    scores = evaluate_onnx(model, "scores")
    expected = X.T @ (scores - LABELS) * (2 / LABELS.size)
    np.testing.assert_allclose(found["w_grad"], expected, rtol=1e-4, atol=1e-6)
