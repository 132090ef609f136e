"""Draw operators that move, repeat, pad or resize what a tensor holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from tests.support.random_graphs.drafts import DrawnModel, Unfit, Value

Made = Sequence[Value]


def draw_transpose(draft: DrawnModel) -> Made:
    value = draft.value()
    if draft.flag():
        return [draft.add("Transpose", [value])]
    return [draft.add("Transpose", [value], perm=draft.order(value.rank))]


def draw_reshape(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    way = draft.pick(["zeros", "minus", "split", "path", "flat"])
    if way == "flat":
        return [draft.add("Reshape", [value, draft.constant([-1])])]
    if way == "zeros":
        shape = [0] * value.rank
        if draft.flag():
            shape[draft.axis(value)] = -1
        if draft.flag():
            shape.append(1)
        return [draft.add("Reshape", [value, draft.constant(shape)])]
    if not value.is_batch_first:
        raise Unfit
    rest = math.prod(value.shape[1:])
    factor = draft.pick([n for n in range(1, rest + 1) if rest % n == 0])
    if way == "minus":
        return [draft.add("Reshape", [value, draft.constant([-1, factor, rest // factor])])]
    if way == "split":
        return [draft.add("Reshape", [value, draft.constant([0, rest // factor, factor])])]
    extent: dict[str, Any] = {"start": 0, "end": 1} if draft.opset >= 15 and draft.flag() else {}
    size = draft.add("Shape", [value], **extent)
    if not extent:
        index = draft.constant([0]) if draft.flag() else draft.constant(0)
        size = draft.add("Gather", [size, index], axis=0)
        if size.rank == 0:
            size = draft.unsqueeze(size, [0])
    shape_value = draft.add("Concat", [size, draft.constant([factor, -1])], axis=0)
    return [draft.add("Reshape", [value, shape_value])]


def draw_flatten(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    if draft.flag():
        return [draft.add("Flatten", [value])]
    least = -value.rank if draft.opset >= 11 else 0
    return [draft.add("Flatten", [value], axis=draft.number(least, value.rank))]


def draw_unsqueeze(draft: DrawnModel) -> Made:
    value = draft.value(most_rank=4)
    count = draft.number(1, 2)
    axes = draft.order(value.rank + count)[:count]
    low = draft.opset >= 11
    axes = [axis - value.rank - count if low and draft.flag() else axis for axis in axes]
    return [draft.unsqueeze(value, axes)]


def draw_squeeze(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    ones = [axis for axis in value.fixed if value.shape[axis] == 1]
    if not ones:
        axis = draft.axis(value, fixed=True)
        value = draft.add("Gather", [value, draft.constant([0])], axis=axis)
        ones = [axis % value.rank]
    if draft.flag():
        return [draft.add("Squeeze", [value])]
    axes = [axis - value.rank if draft.opset >= 11 and draft.flag() else axis for axis in ones]
    if draft.opset >= 13:
        return [draft.add("Squeeze", [value, draft.constant(axes)])]
    return [draft.add("Squeeze", [value], axes=axes)]


def draw_concat(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    axis = draft.axis(value)

    def fits(other: Value) -> bool:
        pairs = zip(value.arrays, other.arrays, strict=True)
        at = axis % value.rank
        return other.rank == value.rank and all(
            one.shape[i] == two.shape[i] for one, two in pairs for i in range(one.ndim) if i != at
        )

    others = [other for other in draft.values if other.is_float and fits(other)]
    parts = [value, draft.pick(others)]
    if set(range(value.rank)) - {axis % value.rank} <= set(value.fixed) and draft.flag():
        shape = [*value.shape]
        shape[axis] = 2
        parts.append(draft.weight(*shape))
    if draft.flag():
        parts.reverse()
    return [draft.add("Concat", parts, axis=axis)]


def draw_split(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    axis = draft.axis(value, fixed=True)
    size = value.shape[axis]
    first = draft.number(1, size - 1)
    sizes = [first, size - first]
    if draft.opset >= 18 and draft.flag():
        return draft.add_several("Split", [value], 2, axis=axis, num_outputs=2)
    if draft.opset >= 13:
        return draft.add_several("Split", [value, draft.constant(sizes)], 2, axis=axis)
    return draft.add_several("Split", [value], 2, axis=axis, split=sizes)


def draw_slice(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    axes = draft.order(value.rank)[: draft.number(1, min(2, value.rank))]
    starts, ends, steps = [], [], []
    for axis in axes:
        step = draft.pick([1, 1, 2, -1, -2]) if draft.opset >= 10 else 1
        size = value.shape[axis]
        if step < 0:
            starts.append(draft.pick([-1, size, 2**31 - 1, size - 1]))
            ends.append(draft.pick([-(2**31), -size - 1, -(2**63) + 1, 0]))
        else:
            starts.append(draft.pick([0, 1, -1, -2, -size]))
            ends.append(draft.pick([2**31 - 1, 2**63 - 1, -1, size]))
        steps.append(step)
    if draft.opset < 10:
        return [draft.add("Slice", [value], axes=axes, starts=starts, ends=ends)]
    named = [axis - value.rank if draft.flag() else axis for axis in axes]
    inputs: list[Value | None] = [value, draft.constant(starts), draft.constant(ends)]
    if sorted(axes) == list(range(len(axes))) == axes and draft.flag():
        inputs.append(None)
    else:
        inputs.append(draft.constant(named))
    if any(step != 1 for step in steps) or draft.flag():
        inputs.append(draft.constant(steps))
    elif inputs[-1] is None:
        inputs.pop()
    return [draft.add("Slice", inputs)]


def draw_pad(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    modes = [None, "constant", "reflect", "edge"] + (["wrap"] if draft.opset >= 19 else [])
    mode = draft.pick(modes)
    pads = [0] * (2 * value.rank)
    for _ in range(draft.number(1, 3)):
        axis = draft.pick(value.fixed or range(value.rank))
        most = value.shape[axis] - 1 if mode in ("reflect", "wrap") else 2
        least = -1 if mode in (None, "constant") and value.shape[axis] > 2 else 0
        pads[axis + draft.pick([0, value.rank])] = draft.number(least, max(0, min(2, most)))
    filled = draft.pick([None, 0.5]) if mode in (None, "constant") else None
    if draft.opset < 11:
        return [draft.add("Pad", [value], mode=mode, pads=pads, value=filled)]
    inputs: list[Value | None] = [value, draft.constant(pads)]
    if filled is not None:
        inputs.append(draft.constant(filled, np.float32))
    if draft.opset >= 18 and draft.flag():
        axes = draft.order(value.rank)
        inputs[1] = draft.constant([pads[a + side] for side in (0, value.rank) for a in axes])
        inputs += [None] * (3 - len(inputs))
        inputs.append(draft.constant(axes))
    return [draft.add("Pad", inputs, mode=mode)]


def draw_repeat(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1, most_rank=4)
    if draft.flag():
        repeats = [draft.number(1, 2) for _ in range(value.rank)]
        return [draft.add("Tile", [value, draft.constant(repeats)])]
    shape = [draft.pick([1, 2]) if size == 1 else 1 for size in value.shape]
    if draft.flag():
        shape = [draft.number(1, 2), *shape]
    return [draft.add("Expand", [value, draft.constant(shape)])]


def draw_resize(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=3, most_rank=4)
    if draft.opset < 13 or not value.is_batch_first:
        raise Unfit
    mode = draft.pick([None, "nearest", "linear", "cubic"])
    attributes: dict[str, Any] = {
        "mode": mode,
        "coordinate_transformation_mode": draft.pick(
            [None, "half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"]
        ),
    }
    if mode in (None, "nearest"):
        ways = [None, "floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]
        attributes["nearest_mode"] = draft.pick(ways)
    if mode == "cubic":
        if value.rank != 4:
            raise Unfit
        attributes["cubic_coeff_a"] = draft.pick([None, -0.5])
        attributes["exclude_outside"] = draft.pick([None, 1])
    if draft.opset >= 18:
        if mode in ("linear", "cubic"):
            attributes["antialias"] = draft.pick([None, None, 1])
        scales = [draft.pick([2.0, 1.0, 1.5, 0.5]) for _ in range(value.rank - 2)]
        attributes["axes"] = list(range(2, value.rank))
    else:
        scales = [1.0, 1.0] + [draft.pick([2.0, 1.0, 1.5, 0.5]) for _ in range(value.rank - 2)]
    if draft.flag() and draft.opset >= 18:
        sizes = [draft.number(1, 6) for _ in range(value.rank - 2)]
        return [draft.add("Resize", [value, None, None, draft.constant(sizes)], **attributes)]
    return [draft.add("Resize", [value, None, draft.constant(scales, np.float32)], **attributes)]


def draw_blocks(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=4, most_rank=4)
    value.need_fixed(1, 2, 3)
    if draft.flag() and value.shape[1] % 4 == 0:
        mode = draft.pick([None, "DCR", "CRD"]) if draft.opset >= 11 else None
        return [draft.add("DepthToSpace", [value], blocksize=2, mode=mode)]
    return [draft.add("SpaceToDepth", [value], blocksize=draft.pick([2, 1]))]


EQUATIONS = {
    1: ["i,i->", "i->i", "i,j->ij"],
    2: ["ij,kj->ik", "ij->ji", "ij,j->i", "ij->", "ij,ik->jk", "ii->i", "ij,kj"],
    3: ["bij,bkj->bik", "bij,jk->bik", "...ij,kj->...ik", "bij->bj", "bij,bij->b"],
    4: ["bhij,bhkj->bhik", "bhij->bhji", "bhij,j->bhi", "b...j->b..."],
}


def draw_einsum(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1, most_rank=4)
    if draft.opset < 12:
        raise Unfit
    equation = draft.pick(EQUATIONS[value.rank])
    terms = equation.split("->")[0].split(",")
    inputs = [value]
    if len(terms) == 2:
        sizes = dict(zip(terms[0].replace("...", "b"), value.shape, strict=True))
        held = dict(zip(terms[0].replace("...", "b"), range(value.rank), strict=True))
        shared = [held[letter] for letter in terms[1] if letter in held]
        if set(shared) <= set(value.fixed):
            shape = [sizes.get(letter, 2) for letter in terms[1]]
            inputs.append(draft.weight(*shape))
        else:
            inputs.append(value)
    return [draft.add("Einsum", inputs, equation=equation)]


def draw_shape_numbers(draft: DrawnModel) -> Made:
    """Use the extents of a tensor as numbers, or a constant in its shape."""
    value = draft.value(least_rank=1)
    way = draft.pick(["scale", "zeros", "size"])
    if way == "zeros":
        filled = draft.pick([None, np.array([0.5], np.float32)])
        attributes = {}
        if filled is not None:
            attributes["value"] = numpy_helper.from_array(filled)
        made = draft.add("ConstantOfShape", [draft.add("Shape", [value])], **attributes)
        return [draft.add("Add", [made, value])]
    if way == "size":
        count = draft.add("Cast", [draft.add("Size", [value])], to=TensorProto.FLOAT)
        return [draft.add("Div", [value, count])]
    size = draft.add("Cast", [draft.add("Shape", [value])], to=TensorProto.FLOAT)
    size = draft.add("Gather", [size, draft.constant(draft.axis(value))], axis=0)
    return [draft.add("Mul", [value, draft.add("Sqrt", [size])])]


DRAWN: Sequence[Callable[[DrawnModel], Made]] = (
    draw_transpose, draw_reshape, draw_flatten, draw_unsqueeze, draw_squeeze, draw_concat,
    draw_split, draw_slice, draw_slice, draw_pad, draw_pad, draw_repeat, draw_resize, draw_blocks,
    draw_einsum, draw_shape_numbers,
)  # fmt: skip
