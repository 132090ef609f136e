"""Draw operators that few models have, and losses that are part of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.support.random_graphs.drafts import DrawnModel, Unfit, Value

Made = Sequence[Value]


def draw_crop(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    if draft.opset < 18:
        raise Unfit
    axis = draft.axis(value, fixed=True)
    size = draft.constant([draft.number(1, value.shape[axis] + 2)])
    return [draft.add("CenterCropPad", [value, size], axes=[axis])]


def draw_compression(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    if draft.opset < 11:
        raise Unfit
    axis = draft.axis(value, fixed=True)
    kept = [draft.flag() for _ in range(draft.number(1, value.shape[axis]))]
    return [draft.add("Compress", [value, draft.constant(kept, np.bool_)], axis=axis)]


def draw_determinant(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=2, most_rank=4)
    value.need_fixed(-1)
    if draft.opset < 11 or value.rank not in (2, 3, 4):
        raise Unfit
    square = draft.add("MatMul", [value, draft.weight(value.shape[-1], 2)])
    order = [*range(value.rank - 2), value.rank - 1, value.rank - 2]
    square = draft.add("MatMul", [draft.add("Transpose", [square], perm=order), square])
    return [draft.add("Det", [square])]


def draw_positions(draft: DrawnModel) -> Made:
    """Add a row of a table for each place along an axis."""
    value = draft.value(least_rank=3)
    value.need_fixed(-1, -2)
    size = draft.add("Gather", [draft.add("Shape", [value]), draft.constant(-2)], axis=0)
    if draft.opset < 11:
        raise Unfit
    places = draft.add("Range", [draft.constant(0), size, draft.constant(1)])
    table = draft.weight(value.shape[-2] + 1, value.shape[-1])
    return [draft.add("Add", [value, draft.add("Gather", [table, places], axis=0)])]


def draw_branch(draft: DrawnModel) -> Made:
    """Choose between two bodies by a constant, or by the size of a tensor."""
    value = draft.value()
    condition = draft.constant(draft.flag(), np.bool_)
    if draft.flag():
        size = draft.add("Size", [value])
        condition = draft.add("Less", [draft.constant(0), size])
    bodies = []
    for op in ("Relu", "Neg"):
        name = draft.name("b")
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        body = helper.make_graph([helper.make_node(op, [value.name], [name])], op, [], [output])
        bodies.append(body)
    return draft.add_several(
        "If", [condition], 1, outer=[value], then_branch=bodies[0], else_branch=bodies[1]
    )


def draw_grid_sample(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=4, most_rank=4)
    if draft.opset < 16 or not value.is_batch_first:
        raise Unfit
    modes = ["linear", "nearest", "cubic"] if draft.opset >= 20 else ["bilinear", "bicubic"]
    grid = draft.input(np.float32, (2, 3, 2))
    return [
        draft.add(
            "GridSample", [value, grid], mode=draft.pick(modes),
            padding_mode=draft.pick([None, "zeros", "border", "reflection"]),
            align_corners=draft.pick([None, 0, 1]),
        )
    ]  # fmt: skip


def draw_unpool(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=4, most_rank=4)
    if draft.opset < 11 or not value.is_batch_first:
        raise Unfit
    window: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2]}
    pooled, places = draft.add_several("MaxPool", [value], 2, **window)
    return [draft.add("MaxUnpool", [pooled, places], **window)]


def draw_wide_pool(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=3, most_rank=5)
    if not value.is_batch_first:
        raise Unfit
    return [draft.add("GlobalLpPool", [value], p=draft.pick([None, 1, 2, 3]))]


def draw_loss(draft: DrawnModel, value: Value) -> Value:
    """Add a loss to a tensor, of labels that are an input; or else its mean."""
    op = draft.pick(["ReduceMean", "SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"])
    fits = value.rank >= 2 and value.is_batch_first and draft.opset >= 12
    if op == "ReduceMean" or not fits or len(draft.inputs) >= 4:
        return draft.add("ReduceMean", [value], keepdims=0)
    classes = value.shape[1]
    labels = draft.input(np.int64, value.shape[2:], classes)
    inputs = [value, labels]
    if op == "NegativeLogLikelihoodLoss":
        inputs[0] = draft.add("LogSoftmax", [value], axis=1)
    if draft.flag():
        inputs.append(draft.constant(np.linspace(0.5, 1.5, classes), np.float32))
    ignored = draft.pick([None, 0])
    return draft.add(op, inputs, reduction=draft.pick([None, "sum"]), ignore_index=ignored)


DRAWN: Sequence[Callable[[DrawnModel], Made]] = (
    draw_crop, draw_compression, draw_determinant, draw_positions, draw_branch, draw_grid_sample,
    draw_unpool, draw_wide_pool,
)  # fmt: skip
