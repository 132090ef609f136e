"""Draw operators that pick or place elements by indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto

from tests.support.random_graphs.drafts import DrawnModel, Unfit, Value

Made = Sequence[Value]


def _draw_indices(draft: DrawnModel, shape: Sequence[int], limit: int) -> Value:
    random = np.random.default_rng(math.prod(shape) + limit)
    least = -limit if draft.opset >= 11 and draft.flag() else 0
    kind = draft.pick([np.int64, np.int32])
    return draft.constant(random.integers(least, limit, shape), kind)


def draw_gather(draft: DrawnModel) -> Made:
    if draft.flag():
        value = draft.value(least_rank=1)
        axis = draft.axis(value, fixed=True)
        shape = draft.pick([(2,), (), (1,), (2, 2)])
        indices = _draw_indices(draft, shape, value.shape[axis])
        return [draft.add("Gather", [value, indices], axis=axis)]
    rows = draft.number(2, 5)
    table = draft.weight(rows, draft.number(1, 4))
    kind = draft.pick([np.int64, np.int32])
    indices = draft.input(kind, draft.pick([(), (3,), (1,)]), rows)
    return [draft.add("Gather", [table, indices], axis=draft.pick([0, -2]))]


def draw_one_hot(draft: DrawnModel) -> Made:
    depth = draft.number(2, 4)
    indices = draft.input(np.int64, draft.pick([(), (3,)]), depth)
    values = draft.constant(draft.pick([[0.0, 1.0], [-0.5, 2.0]]), np.float32)
    axis = draft.pick([None, -1, 0, 1])
    size = draft.constant(depth if draft.flag() else [depth])
    hot = draft.add("OneHot", [indices, size, values], axis=axis)
    return [draft.add("MatMul", [hot, draft.weight(hot.shape[-1], 2)])] if axis is None else [hot]


def draw_gather_elements(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    axis = draft.axis(value, fixed=True)
    if draft.opset < 11:
        raise Unfit
    if value.is_batch_first and draft.flag():
        shape = list(value.shape)
        shape[axis] = draft.number(1, 3)
        indices = draft.input(np.int64, shape[1:], value.shape[axis])
    else:
        indices = draft.add("ArgMax", [value], axis=axis, keepdims=1)
    return [draft.add("GatherElements", [value, indices], axis=axis)]


def draw_gather_nd(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=2)
    if draft.opset < 12:
        raise Unfit
    if not value.is_batch_first:
        if len(value.fixed) < value.rank:
            raise Unfit
        indices = _draw_indices(draft, (2, 1), value.shape[0])
        return [draft.add("GatherND", [value, draft.add("Cast", [indices], to=TensorProto.INT64)])]
    indices = draft.input(np.int64, draft.pick([(1,), (2, 1)]), value.shape[1])
    return [draft.add("GatherND", [value, indices], batch_dims=1)]


def draw_scatter_elements(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=2)
    axis = draft.axis(value, fixed=True, least=1)
    if draft.opset < 16 or not value.is_batch_first:
        raise Unfit
    reductions = ["add", "mul"] + (["max", "min"] if draft.opset >= 18 else [])
    shape = list(value.shape)
    indices = draft.input(np.int64, shape[1:], value.shape[axis])
    updates = draft.add("Tanh", [value])
    return [
        draft.add(
            "ScatterElements", [value, indices, updates], axis=axis,
            reduction=draft.pick(reductions),
        )
    ]  # fmt: skip


def draw_scatter_nd(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    table = draft.weight(4, 3)
    if draft.opset < 16:
        raise Unfit
    reductions = [None, "none", "add", "mul"] + (["max", "min"] if draft.opset >= 18 else [])
    indices = draft.constant([[3], [1]])
    made = draft.add(
        "ScatterND", [table, indices, draft.weight(2, 3)], reduction=draft.pick(reductions)
    )
    if value.shape[-1] != 3 or value.rank - 1 not in value.fixed:
        return [made]
    return [draft.add("MatMul", [value, draft.add("Transpose", [made])])]


def draw_reverse(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=2)
    if draft.opset < 10 or not value.is_batch_first:
        raise Unfit
    lengths = draft.add("Expand", [draft.constant([draft.number(1, value.shape[1])]),
                                   draft.add("Shape", [value])])  # fmt: skip
    while lengths.rank > 1:
        lengths = draft.add("Gather", [lengths, draft.constant(0)], axis=lengths.rank - 1)
    return [draft.add("ReverseSequence", [value, lengths], batch_axis=0, time_axis=1)]


DRAWN: Sequence[Callable[[DrawnModel], Made]] = (
    draw_gather, draw_gather, draw_one_hot, draw_gather_elements, draw_gather_nd,
    draw_scatter_elements, draw_scatter_nd, draw_reverse,
)  # fmt: skip
