"""Products of matrices keep their ranks where ONNX Runtime merges what is around them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.names import Target
from splitonnx.partitioner.lowerings.product_fusions import separate_products
from splitonnx.partitioner.partitions import cut
from tests.support.case_trials import TARGETS
from tests.support.nets import FLOAT, Net
from tests.support.small_models import evaluate, hold_predictions, hold_step

X = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)

WRONG = ["vector", "moved vector", "scaled result", "divided result", "scaled operand"]


def build(kind: str) -> onnx.ModelProto:
    net = Net()
    net.op("Mul", "x", net.constant("w", np.linspace(0.5, 2, 8, dtype=np.float32)), out="h")
    net.op("Tanh", "h", out="t")
    turned = net.op("Transpose", "t", out="turned", perm=[0, 2, 1])
    if kind == "moved vector":
        turned = net.op("Relu", turned, out="r")
    if "vector" in kind:
        net.op("MatMul", turned, net.constant("v", np.linspace(-1, 2, 5, dtype="f")), out="y")
        return net.finish({"x": (FLOAT, ["N", 5, 8])}, "y", 8)
    three = net.constant("three", np.full((1, 1, 1, 1), 3, np.float32))
    if kind == "scaled operand":
        net.op("MatMul", net.op("Mul", "t", three, out="scaled"), turned, out="y")
    elif kind == "fitting scale":
        scale = net.constant("scale", np.full((1,), 3, np.float32))
        net.op("Unsqueeze", "t", net.constant("front", np.array([0])), out="wide")
        net.op("Mul", net.op("MatMul", "wide", turned, out="m"), scale, out="y")
    else:
        operator = "Mul" if kind == "scaled result" else "Div"
        net.op(operator, net.op("MatMul", "t", turned, out="m"), three, out="y")
    graph_output = onnx.helper.make_tensor_value_info("y", FLOAT, [1, "N", 5, 5])
    model = net.finish({"x": (FLOAT, ["N", 5, 8])}, "h", 5, 8)
    model.graph.output[0].CopyFrom(graph_output)
    return model


def load(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {"x": X, "labels": np.ones_like(evaluate(model, {"x": X})["y"])}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", [*WRONG, "fitting scale"])
def test_predictions_are_those_of_the_model(kind: str, target: Target) -> None:
    model = build(kind)
    bundle = cut(
        model, at="t", loss="mse", train=["^w$"], client_target=target, server_target=target
    )
    hold_predictions(bundle, model, {"x": X})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["vector", "moved vector"])
def test_training_through_a_product_with_a_vector_is_that_of_the_model(
    kind: str, target: Target
) -> None:
    model = build(kind)
    bundle = cut(
        model, at=None, loss="mse", train=["."], client_target=target, server_target=target
    )
    hold_step(bundle, model, load(model), ["w", "v"], loss="mse")


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "moved vector"])
def test_the_fault_of_the_runtime_is_still_there(kind: str) -> None:
    """If this fails, ONNX Runtime is mended, and nothing need be kept apart any more."""
    model = build(kind)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": X})
    expected = evaluate(model, {"x": X})["y"]
    assert found.shape != expected.shape or not np.allclose(found, expected, atol=0.1)


def test_scales_of_the_same_rank_stay_as_they_are() -> None:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(build("fitting scale")))
    before = [node.op_type for node in model.graph]
    separate_products(model.graph)
    assert [node.op_type for node in model.graph] == before
