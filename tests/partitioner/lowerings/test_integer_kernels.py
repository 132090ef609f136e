"""Products of integers are exact on every processor, and two pairs round twice.

Kernels for processors without VNNI saturate, which a test can see on such a processor only.  So the
tests also look at what makes them saturate: signed weights larger than 64.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.names import Target
from splitonnx.partitioner.lowerings.integer_kernels import (
    describe_saturation,
    list_saturating,
    separate_pairs,
    use_unsigned_integers,
)
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.nets import FLOAT, Net
from tests.support.quantized_graphs import round_to_steps
from tests.support.small_models import hold_predictions

RANDOM = np.random.default_rng(0)
ROWS = np.abs(RANDOM.standard_normal((3, 16))).astype(np.float32) + 2
IMAGES = np.abs(RANDOM.standard_normal((3, 2, 5, 5))).astype(np.float32) + 2
PRODUCTS = ["MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"]


def draw_weights(*shape: int, largest: int = 127) -> np.ndarray:
    """Draw positive integers, whose products with large numbers add up."""
    weights = RANDOM.integers(1, largest + 1, shape).astype(np.int8)
    weights.flat[0] = largest
    return weights


def set_scale(net: Net, name: str, scale: float, zero: int, dtype: type) -> list[str]:
    return [
        net.constant(f"{name}.scale", np.array(scale, np.float32)),
        net.constant(f"{name}.zero", np.array(zero, dtype)),
    ]


def build(kind: str, dtype: type, largest: int = 127) -> onnx.ModelProto:
    """Build a frozen product of integers before a trained layer."""
    net = Net(opset=19)
    shape = (4, 2, 3, 3) if "Conv" in kind else (16, 4)
    weights = net.constant("w", draw_weights(*shape, largest=largest))
    of_x = set_scale(net, "x", 0.02, 3, dtype)
    of_w = set_scale(net, "w", 0.01, 2, np.int8)
    of_y = set_scale(net, "y", 0.8, 5, dtype)
    q = net.op("QuantizeLinear", "x", *of_x, out="q")
    if "QLinear" in kind:
        net.op(kind, q, *of_x, weights, *of_w, *of_y, out="p")
        net.op("DequantizeLinear", "p", *of_y, out="f")
    else:
        net.op(kind, q, weights, of_x[1], of_w[1], out="p")
        net.op("Mul", net.op("Cast", "p", out="c", to=1), of_w[0], out="f")
    operator = "GlobalAveragePool" if "Conv" in kind else "Relu"
    net.op("Flatten", net.op(operator, "f", out="h"), out="flat")
    net.op("MatMul", "flat", net.weight("v", 4, 2), out="y")
    return net.finish({"x": (FLOAT, ["N", *choose_data(kind).shape[1:]])}, "y", 2)


def choose_data(kind: str) -> np.ndarray:
    return IMAGES if "Conv" in kind else ROWS


def compute(model: onnx.ModelProto, kind: str, dtype: type) -> np.ndarray:
    """Compute the output with numpy, in integers of 64 bits."""
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    q = np.clip(np.rint(choose_data(kind) / np.float32(0.02)) + 3, low, high).astype(np.int64) - 3
    w = stored["w"].astype(np.int64) - 2
    if "Conv" in kind:
        windows = np.lib.stride_tricks.sliding_window_view(q, (3, 3), (2, 3))
        product = np.einsum("nchwij,kcij->nkhw", windows, w)
    else:
        product = q @ w
    floats = product * 0.01
    if "QLinear" in kind:
        floats = (np.clip(np.rint(product * (0.02 * 0.01 / 0.8)) + 5, low, high) - 5) * 0.8
    h = floats.mean((2, 3)) if "Conv" in kind else np.maximum(floats, 0)
    return np.asarray(h @ stored["v"], np.float32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_results_are_those_of_exact_integers(kind: str, dtype: type, target: Target) -> None:
    model, data = build(kind, dtype), {"x": choose_data(kind)}
    bundle = cut(model, at="h", loss="mse", client_target=target, server_target=target)
    content, expected = merge(bundle), compute(model, kind, dtype)
    found = onnxruntime.InferenceSession(content).run(None, data)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert verify(bundle, {**data, "labels": expected}, steps=1, batch_size=3).ok
    graph = onnx.load_from_string(content).graph
    (node,) = [node for node in graph.node if node.op_type == kind]
    assert node.name == "p_node"
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert stored[node.input[3 if "QLinear" in kind else 1]] == onnx.TensorProto.UINT8


@pytest.mark.parametrize(("largest", "changed"), [(64, False), (65, True)])
def test_small_weights_stay_as_they_are(largest: int, changed: bool) -> None:
    proto = onnx.shape_inference.infer_shapes(build("MatMulInteger", np.uint8, largest))
    model = ir.from_proto(proto)
    use_unsigned_integers(model.graph)
    assert ("w#unsigned" in model.graph.initializers) == changed


def build_pairs(largest: int) -> onnx.ModelProto:
    """Build a MatMul between pairs, after two pairs of other scales one after the other."""
    net = Net(opset=19)
    source = "x"
    for name, scale, zero in (("a", 0.02, 10), ("b", 0.1, 20)):
        settings = set_scale(net, name, scale, zero, np.uint8)
        net.op("QuantizeLinear", source, *settings, out=f"{name}.q")
        source = net.op("DequantizeLinear", f"{name}.q", *settings, out=name)
    weights = net.constant("w", draw_weights(16, 4, largest=largest))
    net.op("DequantizeLinear", weights, *set_scale(net, "w", 0.01, 0, np.int8), out="f")
    net.op("MatMul", "b", "f", out="h")
    net.op("MatMul", net.op("Relu", "h", out="r"), net.weight("v", 4, 2), out="y")
    return net.finish({"x": (FLOAT, ["N", 16])}, "y", 2)


@pytest.mark.parametrize("target", TARGETS)
def test_pairs_round_as_often_as_the_model_says(target: Target) -> None:
    model = build_pairs(largest=64)
    bundle = cut(model, at="h", loss="mse", client_target=target, server_target=target)
    hold_predictions(bundle, model, {"x": ROWS})
    merged = onnx.load_from_string(merge(bundle))
    merged.graph.output.append(onnx.ValueInfoProto(name="b"))
    session = onnxruntime.InferenceSession(merged.SerializeToString())
    expected = round_to_steps(round_to_steps(ROWS, 0.02, 10), 0.1, 20)
    np.testing.assert_allclose(session.run(["b"], {"x": ROWS})[0], expected, atol=1e-6)


def test_one_barrier_is_between_two_pairs() -> None:
    model = ir.from_proto(build_pairs(largest=64))
    for _ in range(2):
        separate_pairs(model.graph)
        assert [node.op_type for node in model.graph].count("Sum") == 1


@pytest.mark.parametrize(("largest", "found"), [(64, []), (65, ["w"]), (127, ["w"])])
def test_weights_that_may_saturate_are_found(largest: int, found: list[str]) -> None:
    graph = ir.from_proto(build_pairs(largest)).graph
    assert list_saturating(graph) == found
    described = describe_saturation(graph)
    assert (described is not None) == bool(found)
    if described is not None:
        assert "'w'" in described
        assert 'session.disable_quant_qdq to "1"' in described


def test_weights_that_a_constant_node_holds_are_named_after_it() -> None:
    graph = ir.from_proto(build_pairs(127)).graph
    (node,) = [node for node in graph if node.op_type == "DequantizeLinear"
               and node.inputs[0] is not None and node.inputs[0].is_initializer()]  # fmt: skip
    held = graph.initializers["w"].const_value
    assert held is not None
    constant = ir.node("Constant", [], {"value": ir.AttrTensor("value", held)})
    made = constant.outputs[0]
    made.name, made.type, made.const_value = "held", ir.TensorType(ir.DataType.INT8), held
    graph.insert_before(node, constant)
    node.replace_input_with(0, made)
    assert list_saturating(graph) == ["held"]
