"""Normalizations of numbers far from zero are held against float64, in prediction and training."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

from splitonnx.names import Target
from splitonnx.partitioner.lowerings.centred_normalizations import (
    centre_normalizations,
    describe_narrow,
)
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from tests.support.case_trials import TARGETS
from tests.support.derivatives import close_net, draw_labels, hold_steps, take_step
from tests.support.nets import FLOAT, Net
from tests.support.oracles import make_evaluator, to_double

_RANDOM = np.random.default_rng(0)
X = (300 + 0.5 * _RANDOM.standard_normal((4, 4, 6))).astype(np.float32)
"""Rows whose mean is 600 times their standard deviation."""

LOST = [
    "layer norm",
    "two axes",
    "scaled mean",
    "formula",
    "formula with Cast",
    "formula with two Subs",
    "group norm",
    "branch",
]
"""Models of which ONNX Runtime 1.19.2 loses most digits."""
KINDS = [*LOST, "instance norm"]
TOLERANCE = 1e-3


def build(kind: str) -> onnx.ModelProto:
    """Build ``kind``, a normalization of x + shift; both the shift and the gain can be trained."""
    net = Net(opset=21)
    net.op("Add", "x", net.constant("shift", np.linspace(-1, 1, 6, dtype="f")), out="h")
    axes = net.constant("axes", np.array([-1]))
    gain, bias = (net.constant(n, np.linspace(0.5, 2, 6, dtype="f")) for n in ("gain", "bias"))
    if kind == "layer norm":
        net.op("LayerNormalization", "h", gain, bias, out="y")
    elif kind == "two axes":
        square = net.constant("square", np.linspace(0.5, 2, 24, dtype="f").reshape(4, 6))
        net.op("LayerNormalization", "h", square, out="y", axis=1)
    elif kind == "scaled mean":
        node = helper.make_node("LayerNormalization", ["h", gain, bias], ["l", "mean"], name="l")
        net.nodes.append(node)
        net.op("Mul", "l", "mean", out="y")
    elif "formula" in kind:
        _add_formula(net, kind, axes)
    elif kind == "branch":
        net.op("ReduceMax", "h", out="largest", keepdims=0)
        net.op("Greater", "largest", net.constant("limit", np.array(0, np.float32)), out="is_large")
        branches = (_make_branch(name, kind) for name, kind in (("t", True), ("e", False)))
        net.op(
            "If",
            "is_large",
            out="y",
            **dict(zip(("then_branch", "else_branch"), branches, strict=True)),
        )
    else:
        channels = [net.constant(n, np.linspace(0.5, 2, 4, dtype="f")) for n in ("gains", "biases")]
        groups = {"num_groups": 2} if kind == "group norm" else {}
        operator = "GroupNormalization" if groups else "InstanceNormalization"
        net.op(operator, "h", *channels, out="y", **groups)
    model = close_net(net, {"x": X})
    del model.graph.output[:]  # not every operator's shape is inferred
    model.graph.output.append(helper.make_tensor_value_info("y", FLOAT, ["N", 4, 6]))
    return model


def _add_formula(net: Net, kind: str, axes: str) -> None:
    net.op("ReduceMean", "h", axes, out="mean")
    net.op("Sub", "h", "mean", out="gap")
    squared = "gap"
    if "two Subs" in kind:
        squared = net.op("Sub", "h", "mean", out="gap.again")
    if "Cast" in kind:
        squared = net.op("Cast", "gap", out="cast", to=1)
    net.op("Pow", squared, net.constant("two", np.array(2, np.float32)), out="power")
    net.op("ReduceMean", "power", axes, out="variance")
    net.op("Add", "variance", net.constant("epsilon", np.array(1e-5, np.float32)), out="raised")
    net.op("Div", "gap", net.op("Sqrt", "raised", out="root"), out="normal")
    net.op("Add", net.op("Mul", "normal", "gain", out="scaled"), "bias", out="y")


def _make_branch(name: str, normalizes: bool) -> onnx.GraphProto:
    result = helper.make_tensor_value_info(f"{name}.y", onnx.TensorProto.FLOAT, None)
    kind, inputs = ("LayerNormalization", ["h", "gain", "bias"]) if normalizes else ("Neg", ["h"])
    return helper.make_graph(
        [helper.make_node(kind, inputs, [f"{name}.y"], name=f"{name}.n")], name, [], [result]
    )


def evaluate_exactly(model: onnx.ModelProto) -> np.ndarray:
    results = make_evaluator(to_double(model)).run(None, {"x": X.astype(np.float64)})
    assert isinstance(results, list)
    return np.asarray(results[0])


def measure(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest number."""
    error = np.abs(found - expected).max() / np.abs(expected).max()
    return float(np.nan_to_num(error, nan=np.inf))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_in_float64(kind: str, target: Target) -> None:
    model, at, freeze = build(kind), "h", []
    if kind == "branch":
        model, at, freeze = _train_after(model), "y", ["^(shift|gain|bias)$"]
    bundle = cut(
        model, at=at, loss="mse", client_target=target, server_target=target, freeze=freeze
    )
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        found = client.predict([{"x": X}])
    name = model.graph.output[0].name
    assert measure(found[name], evaluate_exactly(model)) < TOLERANCE


def _train_after(model: onnx.ModelProto) -> onnx.ModelProto:
    """Multiply the output by a weight, since nothing before an If can be trained."""
    model.graph.node.append(helper.make_node("Mul", ["y", "w"], ["z"], name="z_node"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(6, np.float32), "w"))
    model.graph.output[0].name = "z"
    return model


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "branch"])
def test_gradients_are_those_in_float64(kind: str) -> None:
    model = build(kind)
    labels = draw_labels(model, {"x": X})
    last = {"two axes": "square", "group norm": "gains", "instance norm": "gains"}
    trained = ["shift", last.get(kind, "gain")]
    hold_steps(
        take_step(model, {"x": X}, trained), model, "mse", {"x": X, "labels": labels}, trained
    )


@pytest.mark.parametrize("kind", LOST)
def test_the_fault_of_the_runtime_is_still_there(kind: str) -> None:
    """If this fails, ONNX Runtime is mended, and no mean need be subtracted first any more."""
    model = build(kind)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": X})
    assert measure(found, evaluate_exactly(model)) > 2 * TOLERANCE


def test_doubles_are_left_as_they_are() -> None:
    double = to_double(build("layer norm"))
    del double.graph.value_info[:]
    model = ir.from_proto(onnx.shape_inference.infer_shapes(double))
    centre_normalizations(model.graph)
    assert [node.op_type for node in model.graph] == ["Add", "LayerNormalization"]


def test_gradients_gain_no_nodes() -> None:
    """The gradient's node reads the centred input, and a mean is taken once, before the node."""
    bundle = cut(build("layer norm"), at=None, loss="mse")
    (step,) = [graph for name, graph in bundle.client.graphs.items() if name == "model.step.onnx"]
    nodes = onnx.load_from_string(step).graph.node
    (norm,) = (node for node in nodes if node.op_type == "LayerNormalization")
    (slope,) = (node for node in nodes if node.op_type == "LayerNormalizationGrad")
    assert slope.input[1] == norm.input[0] == "y/centred/2"
    assert [node.output[0] for node in nodes if node.op_type == "ReduceMean"].count(
        "y/centred/1"
    ) == 1


@pytest.mark.parametrize("kind", ["layer norm", "formula", "group norm"])
def test_normalizations_of_two_numbers_are_told_since_only_the_parts_are_exact(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = np.repeat([[4.0, 4.001], [-2.0, -2.001]], 2, axis=0).astype(np.float32)
    net = Net(opset=21)
    net.op("Add", "x", net.constant("shift", np.array([1, 1], np.float32)), out="h")
    pair = [net.constant(name, np.ones(2, np.float32)) for name in ("gain", "bias")]
    if kind == "formula":
        _add_formula(net, kind, net.constant("axes", np.array([-1])))
    elif kind == "group norm":
        net.op("GroupNormalization", "h", *pair, out="y", num_groups=1)
    else:
        net.op("LayerNormalization", "h", *pair, out="y")
    model = close_net(net, {"x": rows})
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, ["N", 2]))
    bundle = cut(model, at="h", loss="mse")
    (result,) = make_evaluator(to_double(model)).run(None, {"x": rows.astype(np.float64)})
    assert bundle.server is not None
    server = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, server, threads=1) as client:
        assert measure(client.predict({"x": rows})["y"], np.asarray(result)) < TOLERANCE
    session = onnxruntime.InferenceSession(merge(bundle))
    assert measure(np.array(session.run(None, {"x": rows})[0]), np.asarray(result)) > TOLERANCE
    (told,) = (line for line in caplog.messages if "numbers at a time" in line)
    assert told.startswith("'normal'" if kind == "formula" else "'y'")
    assert any("numbers at a time" in remark.sentence for remark in check(model).remarks)


@pytest.mark.parametrize("kind", KINDS)
def test_normalizations_of_more_numbers_are_not_told(kind: str) -> None:
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(build(kind)))
    assert describe_narrow(model.graph) == ""
