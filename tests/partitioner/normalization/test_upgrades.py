"""Operators of old opsets keep their meaning in opset 18 to 21."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.partitioner.normalization.opset_models import ROW, Writer, X, adapt, run

COLUMN = ROW[:, None, None]


def soften(x: np.ndarray, axis: int) -> np.ndarray:
    axes = tuple(range(axis, x.ndim))
    raised = np.exp(x - x.max(axes, keepdims=True))
    normal: np.ndarray = raised / raised.sum(axes, keepdims=True)
    return normal


OLD: Mapping[str, tuple[int, str, Sequence[str], Mapping[str, Any], np.ndarray]] = {
    # opset, operator, inputs, attributes, what it means
    "Add along an axis": (6, "Add", ["x", "row"], {"broadcast": 1, "axis": 1}, X + COLUMN),
    "Mul from the right": (1, "Mul", ["x", "five"], {"broadcast": 1}, X * np.arange(5, dtype="f4")),
    "Pow of a scalar": (6, "Pow", ["x", "two"], {"broadcast": 1}, X**2),
    "PRelu by channel": (6, "PRelu", ["x", "row"], {}, np.where(X < 0, X * COLUMN, X)),
    "Cast by name": (1, "Cast", ["x"], {"to": "FLOAT"}, X),
    "Clip by attributes": (6, "Clip", ["x"], {"max": 0.5}, np.minimum(X, 0.5)),
    "Concat by default": (1, "Concat", ["x", "x"], {}, np.concatenate([X, X], 1)),
    "Pad by paddings": (1, "Pad", ["x"], {"paddings": [0] * 7 + [1], "value": 2.0},
                        np.pad(X, [(0, 0)] * 3 + [(0, 1)], constant_values=2)),
    "Reshape by attribute": (1, "Reshape", ["x"], {"shape": [6, -1]}, X.reshape(6, -1)),
    "Slice by attributes": (1, "Slice", ["x"], {"starts": [1], "ends": [3], "axes": [2]},
                            X[:, :, 1:3]),
    "Sum all by attribute": (11, "ReduceSum", ["x"], {"keepdims": 0}, np.array(X.sum())),
    "Log-sum by attribute": (17, "ReduceLogSumExp", ["x"], {"axes": [-1]},
                             np.log(np.exp(X).sum(-1, keepdims=True))),
    "Softmax flattened": (12, "Softmax", ["x"], {}, soften(X, 1)),
    "Softmax flattened from the end": (12, "Softmax", ["x"], {"axis": -2}, soften(X, 2)),
    "Softmax of the last": (9, "Softmax", ["x"], {"axis": 3}, soften(X, 3)),
    "LogSoftmax flattened": (11, "LogSoftmax", ["x"], {"axis": 2}, np.log(soften(X, 2))),
    "Upsample by height": (1, "Upsample", ["x"], {"height_scale": 2.0, "width_scale": 1.0},
                           X.repeat(2, 2)),
    "Selu with its first constants": (
        1, "Selu", ["x"], {}, 1.0507 * np.where(X < 0, 1.6732 * (np.exp(X) - 1), X)
    ),
    "BatchNormalization in test mode": (
        6, "BatchNormalization", ["x", "row", "row", "row", "square"], {"is_test": 1},
        (X - COLUMN) * COLUMN / np.sqrt(COLUMN**2 + 1e-5) + COLUMN,
    ),
    "Dropout in test mode": (6, "Dropout", ["x"], {"is_test": 1, "ratio": 0.5}, X),
    "Dropout that has no mode": (7, "Dropout", ["x"], {"ratio": 0.5}, X),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_an_old_operator_keeps_its_meaning(name: str) -> None:
    opset, kind, inputs, attributes, expected = OLD[name]
    net = Writer(opset)
    arrays = {"row": ROW, "square": ROW**2, "five": np.arange(5, dtype=np.float32),
              "two": np.array([2], np.float32)}  # fmt: skip
    for key in set(inputs) & arrays.keys():
        net.constant(key, arrays[key])
    if opset < 6:
        net.op("Relu", "x", out="unused", consumed_inputs=[0])
    net.op(kind, *inputs, out="y", **attributes)
    (found,) = run(adapt(net.finish({"x": X.shape}, "y", expected.ndim)), {"x": X})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_spatial_0_has_statistics_for_each_feature() -> None:
    net = Writer(7)
    each = np.random.default_rng(2).random((4, *X.shape[1:]), np.float32)
    names = [net.constant(f"c{index}", array) for index, array in enumerate(each)]
    net.op("BatchNormalization", "x", *names, out="y", spatial=0)
    (found,) = run(adapt(net.finish({"x": X.shape}, "y", 4)), {"x": X})
    expected = (X - each[2]) * each[0] / np.sqrt(each[3] + 1e-5) + each[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_resize_of_opset_10_rounds_up_where_it_shrinks() -> None:
    net = Writer(10)
    net.op("Resize", "x", net.constant("s", np.array([1, 1, 0.5, 2], np.float32)), out="y")
    (found,) = run(adapt(net.finish({"x": X.shape}, "y", 4)), {"x": X})
    np.testing.assert_array_equal(found, X[:, :, ::2].repeat(2, 3))


def test_group_normalization_of_opset_18_scales_by_group() -> None:
    net = Writer(18)
    x = X.transpose(0, 2, 1, 3)  # (2, 4, 3, 5)
    two = net.constant("two", np.array([1.0, 3.0], np.float32))
    net.op("GroupNormalization", "x", two, two, out="y", num_groups=2)
    (found,) = run(adapt(net.finish({"x": x.shape}, "y", 4)), {"x": x})
    grouped = x.reshape(2, 2, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    normal = centred / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    scale = np.array([1.0, 3.0])[:, None]
    expected = (normal * scale + scale).reshape(x.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
