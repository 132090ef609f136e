"""Draw operators that few models have, and losses that are part of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.support.random_graphs.builders import GraphBuilder, Unfit, Value

Made = Sequence[Value]


def draw_crop(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    if builder.opset < 18:
        raise Unfit
    axis = builder.axis(value, fixed=True)
    size = builder.constant([builder.number(1, value.shape[axis] + 2)])
    return [builder.add("CenterCropPad", [value, size], axes=[axis])]


def draw_compression(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    if builder.opset < 11:
        raise Unfit
    axis = builder.axis(value, fixed=True)
    kept = [builder.flag() for _ in range(builder.number(1, value.shape[axis]))]
    return [builder.add("Compress", [value, builder.constant(kept, np.bool_)], axis=axis)]


def draw_determinant(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=2, most_rank=4)
    value.need_fixed(-1)
    if builder.opset < 11 or value.rank not in (2, 3, 4):
        raise Unfit
    square = builder.add("MatMul", [value, builder.weight(value.shape[-1], 2)])
    order = [*range(value.rank - 2), value.rank - 1, value.rank - 2]
    square = builder.add("MatMul", [builder.add("Transpose", [square], perm=order), square])
    return [builder.add("Det", [square])]


def draw_positions(builder: GraphBuilder) -> Made:
    """Add a row of a table for each place along an axis."""
    value = builder.value(least_rank=3)
    value.need_fixed(-1, -2)
    size = builder.add("Gather", [builder.add("Shape", [value]), builder.constant(-2)], axis=0)
    if builder.opset < 11:
        raise Unfit
    places = builder.add("Range", [builder.constant(0), size, builder.constant(1)])
    table = builder.weight(value.shape[-2] + 1, value.shape[-1])
    return [builder.add("Add", [value, builder.add("Gather", [table, places], axis=0)])]


def draw_branch(builder: GraphBuilder) -> Made:
    """Choose between two bodies by a constant, or by the size of a tensor."""
    value = builder.value()
    condition = builder.constant(builder.flag(), np.bool_)
    if builder.flag():
        size = builder.add("Size", [value])
        condition = builder.add("Less", [builder.constant(0), size])
    bodies = []
    for op in ("Relu", "Neg"):
        name = builder.name("b")
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        body = helper.make_graph([helper.make_node(op, [value.name], [name])], op, [], [output])
        bodies.append(body)
    return builder.add_several(
        "If", [condition], 1, outer=[value], then_branch=bodies[0], else_branch=bodies[1]
    )


def draw_grid_sample(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=4, most_rank=4)
    if builder.opset < 16 or not value.is_batch_first:
        raise Unfit
    modes = ["linear", "nearest", "cubic"] if builder.opset >= 20 else ["bilinear", "bicubic"]
    grid = builder.input(np.float32, (2, 3, 2))
    return [
        builder.add(
            "GridSample", [value, grid], mode=builder.pick(modes),
            padding_mode=builder.pick([None, "zeros", "border", "reflection"]),
            align_corners=builder.pick([None, 0, 1]),
        )
    ]  # fmt: skip


def draw_unpool(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=4, most_rank=4)
    if builder.opset < 11 or not value.is_batch_first:
        raise Unfit
    window: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2]}
    pooled, places = builder.add_several("MaxPool", [value], 2, **window)
    return [builder.add("MaxUnpool", [pooled, places], **window)]


def draw_wide_pool(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=3, most_rank=5)
    if not value.is_batch_first:
        raise Unfit
    return [builder.add("GlobalLpPool", [value], p=builder.pick([None, 1, 2, 3]))]


def draw_loss(builder: GraphBuilder, value: Value) -> Value:
    """Add a loss to a tensor, of labels that are an input; or else its mean."""
    op = builder.pick(["ReduceMean", "SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"])
    fits = value.rank >= 2 and value.is_batch_first and builder.opset >= 12
    if op == "ReduceMean" or not fits or len(builder.inputs) >= 4:
        return builder.add("ReduceMean", [value], keepdims=0)
    classes = value.shape[1]
    labels = builder.input(np.int64, value.shape[2:], classes)
    inputs = [value, labels]
    if op == "NegativeLogLikelihoodLoss":
        inputs[0] = builder.add("LogSoftmax", [value], axis=1)
    if builder.flag():
        inputs.append(builder.constant(np.linspace(0.5, 1.5, classes), np.float32))
    ignored = builder.pick([None, 0])
    return builder.add(op, inputs, reduction=builder.pick([None, "sum"]), ignore_index=ignored)


DRAWN: Sequence[Callable[[GraphBuilder], Made]] = (
    draw_crop, draw_compression, draw_determinant, draw_positions, draw_branch, draw_grid_sample,
    draw_unpool, draw_wide_pool,
)  # fmt: skip
