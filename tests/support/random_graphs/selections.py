"""Draw operators that pick or place elements by indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto

from tests.support.random_graphs.builders import GraphBuilder, Unfit, Value

Made = Sequence[Value]


def _draw_indices(builder: GraphBuilder, shape: Sequence[int], limit: int) -> Value:
    random = np.random.default_rng(math.prod(shape) + limit)
    least = -limit if builder.opset >= 11 and builder.flag() else 0
    kind = builder.pick([np.int64, np.int32])
    return builder.constant(random.integers(least, limit, shape), kind)


def draw_gather(builder: GraphBuilder) -> Made:
    if builder.flag():
        value = builder.value(least_rank=1)
        axis = builder.axis(value, fixed=True)
        shape = builder.pick([(2,), (), (1,), (2, 2)])
        indices = _draw_indices(builder, shape, value.shape[axis])
        return [builder.add("Gather", [value, indices], axis=axis)]
    rows = builder.number(2, 5)
    table = builder.weight(rows, builder.number(1, 4))
    kind = builder.pick([np.int64, np.int32])
    indices = builder.input(kind, builder.pick([(), (3,), (1,)]), rows)
    return [builder.add("Gather", [table, indices], axis=builder.pick([0, -2]))]


def draw_one_hot(builder: GraphBuilder) -> Made:
    depth = builder.number(2, 4)
    indices = builder.input(np.int64, builder.pick([(), (3,)]), depth)
    values = builder.constant(builder.pick([[0.0, 1.0], [-0.5, 2.0]]), np.float32)
    axis = builder.pick([None, -1, 0, 1])
    size = builder.constant(depth if builder.flag() else [depth])
    hot = builder.add("OneHot", [indices, size, values], axis=axis)
    return (
        [builder.add("MatMul", [hot, builder.weight(hot.shape[-1], 2)])] if axis is None else [hot]
    )


def draw_gather_elements(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    axis = builder.axis(value, fixed=True)
    if builder.opset < 11:
        raise Unfit
    if value.is_batch_first and builder.flag():
        shape = list(value.shape)
        shape[axis] = builder.number(1, 3)
        indices = builder.input(np.int64, shape[1:], value.shape[axis])
    else:
        indices = builder.add("ArgMax", [value], axis=axis, keepdims=1)
    return [builder.add("GatherElements", [value, indices], axis=axis)]


def draw_gather_nd(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=2)
    if builder.opset < 12:
        raise Unfit
    if not value.is_batch_first:
        if len(value.fixed) < value.rank:
            raise Unfit
        indices = _draw_indices(builder, (2, 1), value.shape[0])
        return [
            builder.add("GatherND", [value, builder.add("Cast", [indices], to=TensorProto.INT64)])
        ]
    indices = builder.input(np.int64, builder.pick([(1,), (2, 1)]), value.shape[1])
    return [builder.add("GatherND", [value, indices], batch_dims=1)]


def draw_scatter_elements(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=2)
    axis = builder.axis(value, fixed=True, least=1)
    if builder.opset < 16 or not value.is_batch_first:
        raise Unfit
    reductions = ["add", "mul"] + (["max", "min"] if builder.opset >= 18 else [])
    shape = list(value.shape)
    indices = builder.input(np.int64, shape[1:], value.shape[axis])
    updates = builder.add("Tanh", [value])
    return [
        builder.add(
            "ScatterElements", [value, indices, updates], axis=axis,
            reduction=builder.pick(reductions),
        )
    ]  # fmt: skip


def draw_scatter_nd(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    table = builder.weight(4, 3)
    if builder.opset < 16:
        raise Unfit
    reductions = [None, "none", "add", "mul"] + (["max", "min"] if builder.opset >= 18 else [])
    indices = builder.constant([[3], [1]])
    made = builder.add(
        "ScatterND", [table, indices, builder.weight(2, 3)], reduction=builder.pick(reductions)
    )
    if value.shape[-1] != 3 or value.rank - 1 not in value.fixed:
        return [made]
    return [builder.add("MatMul", [value, builder.add("Transpose", [made])])]


def draw_reverse(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=2)
    if builder.opset < 10 or not value.is_batch_first:
        raise Unfit
    lengths = builder.add("Expand", [builder.constant([builder.number(1, value.shape[1])]),
                                   builder.add("Shape", [value])])  # fmt: skip
    while lengths.rank > 1:
        lengths = builder.add("Gather", [lengths, builder.constant(0)], axis=lengths.rank - 1)
    return [builder.add("ReverseSequence", [value, lengths], batch_axis=0, time_axis=1)]


DRAWN: Sequence[Callable[[GraphBuilder], Made]] = (
    draw_gather, draw_gather, draw_one_hot, draw_gather_elements, draw_gather_nd,
    draw_scatter_elements, draw_scatter_nd, draw_reverse,
)  # fmt: skip
