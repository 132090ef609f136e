"""Bound scores that weights compute from a Softmax or a Sigmoid.

Sums and products with weights may leave what a Softmax makes in its range, as smoothing, a prior or
a matrix of confusions does.  Training may move such weights, but only from the values that they
have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.differentiation.activations.spelled_activations import find_spelled
from splitonnx.partitioner.graphs.builders import known_array

_KEEPING = frozenset({"Cast", "Identity"})
_MOST_STEPS = 16
"""The most nodes behind an activation that are followed."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The least and the largest value that scores can have, along their last axes.

    If ``sums_to_one`` is true, the scores are at least 0 and their sum over the last axis is 1.
    """

    low: np.ndarray
    high: np.ndarray
    sums_to_one: bool = False


def bound_scores(value: ir.Value, read: Callable[[str], np.ndarray | None]) -> Bounds | None:
    """Return bounds of a value that constants and weights compute from an activation.

    ``read`` returns the array of a weight, or ``None`` if there is no weight of this name.  Return
    ``None`` if there is no activation, or if another operator than a sum or product follows it.
    """
    steps: list[tuple[ir.Node, int, np.ndarray]] = []
    for _ in range(_MOST_STEPS):
        node = value.producer()
        if node is None or node.domain:
            return None
        if (first := _bound_activation(value, node)) is not None:
            return _follow(first, steps)
        data = value if node.op_type not in _KEEPING else node.inputs[0]
        if data is value:
            arrays = [_read(own, read) for own in node.inputs]
            opened = [index for index, array in enumerate(arrays) if array is None]
            if len(opened) != 1 or not _is_step(node, arrays):
                return None
            index = opened[0]
            data = node.inputs[index]
            steps += _split(node, index, [array for array in arrays if array is not None])
        if data is None:
            return None
        value = data
    return None


def _read(value: ir.Value | None, read: Callable[[str], np.ndarray | None]) -> np.ndarray | None:
    if value is None:
        return None
    array = known_array(value)
    return read(value.name or "") if array is None else array


def _bound_activation(value: ir.Value, node: ir.Node) -> Bounds | None:
    spelled = find_spelled(value)
    kind = node.op_type if spelled is None else spelled.kind
    if kind not in ("HardSigmoid", "Sigmoid", "Softmax"):
        return None
    rank = len(value.shape) if value.shape is not None else 0
    axis = node.attributes.get_int("axis", -1)
    is_last = kind == "Softmax" and spelled is None and axis in (-1, rank - 1)
    return Bounds(low=np.zeros(1), high=np.ones(1), sums_to_one=is_last)


def _is_step(node: ir.Node, arrays: list[np.ndarray | None]) -> bool:
    """Return whether a node is a sum, product or quotient of scores and known arrays."""
    if node.op_type == "Gemm":
        factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        return arrays[0] is None and factors == [1.0, 1.0] and not _flag(node, "transA")
    if node.op_type == "MatMul":
        return arrays[0] is None and arrays[1] is not None and arrays[1].ndim == 2
    if node.op_type in ("Div", "Sub"):
        return arrays[0] is None
    return node.op_type in ("Add", "Mul")


def _flag(node: ir.Node, name: str) -> bool:
    return bool(node.attributes.get_int(name, 0))


def _split(
    node: ir.Node, index: int, arrays: list[np.ndarray]
) -> list[tuple[ir.Node, int, np.ndarray]]:
    """List what a node does to scores, last first: a Gemm is a product and then a sum."""
    if node.op_type == "Gemm" and _flag(node, "transB"):
        arrays = [arrays[0].T, *arrays[1:]]
    return [(node, number, array.astype(np.float64)) for number, array in enumerate(arrays)][::-1]


def _follow(bounds: Bounds, steps: list[tuple[ir.Node, int, np.ndarray]]) -> Bounds | None:
    for node, number, array in reversed(steps):
        try:
            bounds = _apply(bounds, node, number, array)
        except ValueError:  # shapes that only the whole graph explains
            return None
    return bounds


def _apply(bounds: Bounds, node: ir.Node, number: int, array: np.ndarray) -> Bounds:
    kind = node.op_type
    if kind == "MatMul" or (kind == "Gemm" and number == 0):
        return _multiply(bounds, array)
    if kind in ("Add", "Gemm"):
        return Bounds(low=bounds.low + array, high=bounds.high + array)
    if kind == "Sub":
        return Bounds(low=bounds.low - array, high=bounds.high - array)
    with np.errstate(all="ignore"):
        factor = array if kind == "Mul" else 1 / array
        ends = bounds.low * factor, bounds.high * factor
    return Bounds(low=np.minimum(*ends), high=np.maximum(*ends))


def _multiply(bounds: Bounds, matrix: np.ndarray) -> Bounds:
    """Bound the product with a matrix: a weighted mean of its rows if the scores sum to 1."""
    if bounds.sums_to_one:
        rows = np.allclose(matrix.sum(axis=1), 1, atol=1e-3) and bool((matrix >= 0).all())
        return Bounds(low=matrix.min(axis=0), high=matrix.max(axis=0), sums_to_one=rows)
    shape = (*np.broadcast_shapes(bounds.low.shape[-1:], matrix.shape[:1]), 1)
    low = np.broadcast_to(bounds.low.reshape(-1, 1) if bounds.low.ndim < 2 else np.nan, shape)
    high = np.broadcast_to(bounds.high.reshape(-1, 1) if bounds.high.ndim < 2 else np.nan, shape)
    return Bounds(
        low=np.minimum(low * matrix, high * matrix).sum(axis=0),
        high=np.maximum(low * matrix, high * matrix).sum(axis=0),
    )
