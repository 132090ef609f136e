"""Float weights made from integers: their numbers and their names."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.normalization.dequantized.weights import FloatWeights, Settings


def build(**arrays: np.ndarray) -> tuple[ir.Node, dict[str, ir.Value]]:
    """Build a graph of one node that reads arrays."""
    values = {
        name: ir.Value(name=name, const_value=ir.tensor(array, name=name))
        for name, array in arrays.items()
    }
    node = ir.node("Reader", list(values.values()), name="reader")
    ir.Graph([], node.outputs, nodes=[node], initializers=list(values.values()))
    return node, values


def test_a_number_is_its_distance_from_the_zero_point_times_the_scale_of_its_channel() -> None:
    node, values = build(
        W_quantized=np.array([[1, 2], [3, 4]], np.int8),
        scale=np.array([0.5, 2], np.float32),
        zero=np.array([1, 0], np.int8),
    )
    weights = FloatWeights(is_rounding=False, taken=set(values))
    integers, scale, zero = values.values()
    rows = weights.make(node, integers, Settings(scale=scale, zero=zero, axes=(0,)))
    columns = weights.make(node, integers, Settings(scale=scale, zero=zero))
    assert rows.const_value is not None
    assert columns.const_value is not None
    np.testing.assert_array_equal(rows.const_value.numpy(), [[0, 0.5], [6, 8]])
    np.testing.assert_array_equal(columns.const_value.numpy(), [[0, 4], [1, 8]])
    assert weights.names == ["W", "W#float"]


def test_one_weight_serves_all_that_read_the_same_integers() -> None:
    node, values = build(W_quantized=np.ones(3, np.int8), scale=np.array(0.5, np.float32))
    weights = FloatWeights(is_rounding=False, taken=set(values))
    integers, scale = values.values()
    settings = Settings(scale=scale, zero=None)
    assert weights.make(node, integers, settings) is weights.make(node, integers, settings)
    assert weights.names == ["W"]


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1, 2, 1)])
def test_a_scale_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    node, values = build(W=np.ones((2, 3), np.int8), scale=np.ones(shape, np.float32))
    weights = FloatWeights(is_rounding=False, taken=set(values))
    integers, scale = values.values()
    if shape == (3, 1):  # as many as there are columns
        assert weights.make(node, integers, Settings(scale=scale, zero=None)).name == "W#float"
        return
    with pytest.raises(UnsupportedModel, match=r"'reader' \(Reader\).*does not fit \(2, 3\)"):
        weights.make(node, integers, Settings(scale=scale, zero=None))


def test_integers_that_are_not_stored_are_refused() -> None:
    node, values = build(scale=np.ones((), np.float32))
    weights = FloatWeights(is_rounding=False, taken=set())
    with pytest.raises(UnsupportedModel, match="'given' is not stored in the model"):
        weights.make(node, ir.Value(name="given"), Settings(scale=values["scale"], zero=None))
