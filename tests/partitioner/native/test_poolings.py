"""The evaluator's poolings compute what the standard says, with padding and dilations."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from splitonnx.partitioner.native.poolings import POOLINGS

FLOAT = TensorProto.FLOAT
X = np.random.default_rng(0).standard_normal((2, 2, 9, 7)).astype(np.float32)
KINDS = ("AveragePool", "LpPool", "MaxPool")


def build(
    kind: str, shape: tuple[int, ...], outputs: int = 1, **attributes: Any
) -> onnx.ModelProto:
    names = ["y", "places"][:outputs]
    node = helper.make_node(kind, ["x"], names, **attributes)
    graph = helper.make_graph(
        [node],
        "pooling",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [onnx.ValueInfoProto(name=name) for name in names],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=8)


def evaluate(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    results = ReferenceEvaluator(model, new_ops=list(POOLINGS)).run(None, {"x": x})
    assert isinstance(results, list)
    return results


def pool_row(
    row: np.ndarray, kind: str, mode: str, kernel: int, stride: int, dilation: int
) -> list[float]:
    """Pool a row with the padding of SAME_LOWER or SAME_UPPER, element by element."""
    count = -(-len(row) // stride)
    total = max(0, (count - 1) * stride + (kernel - 1) * dilation + 1 - len(row))
    before = total // 2 if mode == "SAME_UPPER" else -(-total // 2)
    pooled = []
    for window in range(count):
        places = [window * stride + place * dilation - before for place in range(kernel)]
        values = row[[place for place in places if 0 <= place < len(row)]].astype(np.float64)
        norm = float(np.sqrt((values**2).sum()))
        pooled.append({"AveragePool": values.mean(), "LpPool": norm, "MaxPool": values.max()}[kind])
    return pooled


@pytest.mark.parametrize("mode", ["SAME_LOWER", "SAME_UPPER"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(2, 1, 1), (3, 2, 1), (2, 1, 2), (3, 2, 2), (4, 3, 3)]
)
def test_padding_that_keeps_the_size_follows_the_dilations(
    kind: str, mode: str, kernel: int, stride: int, dilation: int
) -> None:
    model = build(
        kind,
        (2, 2, 63),
        kernel_shape=[kernel],
        strides=[stride],
        dilations=[dilation],
        auto_pad=mode,
    )
    (found,) = evaluate(model, X.reshape(2, 2, 63))
    rows = [pool_row(row, kind, mode, kernel, stride, dilation) for row in X.reshape(4, 63)]
    np.testing.assert_allclose(found, np.reshape(rows, (2, 2, -1)), rtol=1e-6)
    assert found.dtype == np.float32


EXPLICIT: list[dict[str, Any]] = [
    {"kernel_shape": [3, 2]},
    {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 2, 1]},
    {"kernel_shape": [3, 3], "dilations": [2, 3], "pads": [2, 1, 1, 2]},
    {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "VALID"},
    {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1]},
]


@pytest.mark.parametrize("attributes", EXPLICIT, ids=lambda attributes: "-".join(attributes))
@pytest.mark.parametrize("kind", KINDS)
def test_explicit_padding_gives_what_onnx_runtime_gives(
    kind: str, attributes: dict[str, Any]
) -> None:
    model = build(kind, X.shape, **attributes)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (expected,) = session.run(None, {"x": X})
    (found,) = evaluate(model, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_padding_counts_in_an_average_only_where_it_is_included() -> None:
    ones = np.ones((1, 1, 4), np.float32)
    given: dict[str, Any] = {"kernel_shape": [3], "strides": [2], "pads": [1, 1], "ceil_mode": 1}
    (without,) = evaluate(build("AveragePool", ones.shape, **given), ones)
    (included,) = evaluate(build("AveragePool", ones.shape, count_include_pad=1, **given), ones)
    np.testing.assert_array_equal(without, [[[1, 1, 1]]])
    # the last window holds one element, one of padding, and one behind the padding
    np.testing.assert_allclose(included, [[[2 / 3, 1, 1 / 2]]], rtol=1e-6)


def test_a_largest_element_has_a_place_where_the_padding_follows_dilations() -> None:
    model = build("MaxPool", (2, 2, 63), 2, kernel_shape=[3], dilations=[2], auto_pad="SAME_UPPER")
    x = X.reshape(2, 2, 63)
    found, places = evaluate(model, x)
    np.testing.assert_array_equal(found, x.reshape(-1)[places])
    rows = [pool_row(row, "MaxPool", "SAME_UPPER", 3, 1, 2) for row in x.reshape(4, 63)]
    np.testing.assert_allclose(found, np.reshape(rows, (2, 2, -1)), rtol=1e-6)


def test_integers_are_pooled_without_the_padding() -> None:
    x = np.array([[[-5, -3, -4]]], np.int8)
    model = build("MaxPool", x.shape, kernel_shape=[3], pads=[1, 1])
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    (found,) = evaluate(model, x)
    np.testing.assert_array_equal(found, [[[-3, -3, -3]]])
    assert found.dtype == np.int8


def test_each_pooling_is_one_of_onnx() -> None:
    assert {each.__name__ for each in POOLINGS} == set(KINDS)
    assert all(onnx.defs.has(each.__name__) for each in POOLINGS)
