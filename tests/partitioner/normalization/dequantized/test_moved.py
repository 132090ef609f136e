"""Integer weights that are moved before they are dequantized, as in QOperator form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

import splitonnx
from splitonnx.partitioner.normalization.dequantized.replacements import dequantize
from tests.partitioner.normalization.dequantized.test_dynamic import turn
from tests.support.quantized_files import list_kinds, read_weights

X = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
IDS = np.random.default_rng(2).integers(0, 9, (6, 5))
SETTINGS = {
    "x_scale": np.float32(0.03),
    "y_scale": np.float32(0.08),
    "zero": np.uint8(128),
    "signed_zero": np.int8(0),
    "size": np.array([4, 3]),
    "first": np.array([0]),
    "last": np.array([4]),
    "copies": np.array([2, 1]),
    "order": np.array([3, 1, 0, 2]),
}


def build(moves: list[NodeProto], table: np.ndarray, scale: np.ndarray) -> onnx.ModelProto:
    """Build ``x @ w``, where ``moves`` make the integers of w from a table."""
    zero = np.zeros(scale.shape, np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["x_q"]),
        *moves,
        helper.make_node(
            "QLinearMatMul",
            ["x_q", "x_scale", "zero", "w_quantized", "w_scale", "w_zero", "y_scale", "zero"],
            ["y_q"],
        ),
        helper.make_node("DequantizeLinear", ["y_q", "y_scale", "zero"], ["y"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    arrays = {**SETTINGS, "W_quantized": table, "w_scale": scale, "w_zero": zero}
    return close(nodes, given, ["N", 3], arrays)


def close(
    nodes: list[NodeProto], given: Any, shape: list[Any], arrays: dict[str, Any]
) -> onnx.ModelProto:
    """Build a model of those arrays that are read."""
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    read = {name for node in nodes for name in node.input}
    stored = [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items() if n in read]
    graph = helper.make_graph(nodes, "g", [given], [result], stored)
    opsets = [helper.make_opsetid("", 17)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnx.shape_inference.infer_shapes(made)


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, inputs)[0])


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-60, 60, shape, np.int8)


def move(kind: str, *others: str, source: str = "W_quantized", **attributes: Any) -> NodeProto:
    return helper.make_node(kind, [source, *others], ["w_quantized"], **attributes)


MOVES = {
    "transpose": (move("Transpose"), (3, 4), True),
    "squeeze": (move("Squeeze", "first"), (1, 4, 3), True),
    "gather": (move("Gather", "order"), (9, 3), True),
    "slice": (move("Slice", "first", "last", "first"), (9, 3), True),
    "reshape": (move("Reshape", "size"), (2, 6), False),
    "concat": (move("Concat", "W_quantized", axis=0), (2, 3), True),
    "tile": (move("Tile", "copies"), (2, 3), False),
}


@pytest.mark.parametrize("scales", [1, 3])
@pytest.mark.parametrize("name", MOVES)
def test_a_weight_is_dequantized_before_it_is_moved(name: str, scales: int) -> None:
    node, shape, has_axis = MOVES[name]
    scale = np.linspace(0.01, 0.03, scales, dtype=np.float32)
    given = build([node], draw(*shape), scale if scales > 1 else scale.reshape(()))
    turned = turn(given)
    np.testing.assert_array_equal(run(turned, x=X), run(given, x=X))
    if scales > 1 and not has_axis:
        told = dequantize(ir.from_proto(given)).describe()
        assert f"'W_quantized': {np.prod(shape)} quantized numbers are not" in told
        return
    (moved,) = [one for one in turned.graph.node if one.op_type == node.op_type]
    makers = {one.output[0]: one for one in turned.graph.node}
    assert makers[moved.input[0]].op_type == "DequantizeLinear"
    assert makers[moved.input[0]].input[0] == "W"
    np.testing.assert_array_equal(read_weights(turned)["W"], draw(*shape))


def test_rows_with_a_scale_for_each_channel_are_read_from_a_whole_table() -> None:
    nodes = [
        helper.make_node("Gather", ["E_quantized", "ids"], ["e_quantized"]),
        helper.make_node("DequantizeLinear", ["e_quantized", "scale"], ["y"], axis=2),
    ]
    given = helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 5])
    scale = np.linspace(0.01, 0.04, 4, dtype=np.float32)
    arrays = {"E_quantized": draw(9, 4), "scale": scale}
    model = close(nodes, given, ["N", 5, 4], arrays)
    turned = turn(model)
    assert [node.op_type for node in turned.graph.node] == ["DequantizeLinear", "Gather"]
    np.testing.assert_array_equal(run(turned, ids=IDS), draw(9, 4)[IDS] * scale)


def build_embedding() -> onnx.ModelProto:
    """Build what the tool writes of a table whose rows are multiplied by a matrix."""
    nodes = [
        helper.make_node("Gather", ["E_quantized", "ids"], ["e_quantized"]),
        helper.make_node("DequantizeLinear", ["e_quantized", "e_scale", "signed_zero"], ["e"]),
        helper.make_node(
            "QLinearMatMul",
            [
                *("e_quantized", "e_scale", "signed_zero", "W_quantized", "w_scale", "signed_zero"),
                *("y_scale", "signed_zero"),
            ],
            ["m_quantized"],
        ),
        helper.make_node("DequantizeLinear", ["m_quantized", "y_scale", "signed_zero"], ["m"]),
        helper.make_node("Add", ["e", "m"], ["s"]),
        helper.make_node("ReduceMean", ["s"], ["y"], axes=[1], keepdims=0),
    ]
    given = helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 5])
    scales = {"e_scale": np.float32(0.02), "w_scale": np.float32(0.01)}
    random = np.random.default_rng(0)
    tables = {"E_quantized": draw(9, 4), "W_quantized": random.integers(-60, 60, (4, 4), np.int8)}
    return close(nodes, given, ["N", 4], {**SETTINGS, **scales, **tables})


def test_an_embedding_is_trained_and_becomes_integers_again() -> None:
    given = build_embedding()
    assert list_kinds(turn(given)) >= {"Gather", "DequantizeLinear", "MatMul"}
    bundle = splitonnx.cut(given, at="s", loss="mse", dequantize=True, send_labels=True)
    assert set(bundle.client.weights) == {"E", "W"}
    merged = onnx.load_from_string(splitonnx.merge(bundle))
    np.testing.assert_array_equal(run(merged, ids=IDS), run(given, ids=IDS))
    stored = read_weights(merged)
    np.testing.assert_array_equal(stored["E"], draw(9, 4))
    data: dict[str, np.ndarray] = {"ids": IDS, "labels": np.zeros((6, 4), np.float32)}
    found = splitonnx.verify(bundle, data, steps=2, batch_size=3)
    assert found.largest_difference <= 1e-6
