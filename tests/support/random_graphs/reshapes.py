"""Draw operators that move, repeat, pad or resize what a tensor holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from tests.support.random_graphs.builders import GraphBuilder, Unfit, Value

Made = Sequence[Value]


def draw_transpose(builder: GraphBuilder) -> Made:
    value = builder.value()
    if builder.flag():
        return [builder.add("Transpose", [value])]
    return [builder.add("Transpose", [value], perm=builder.order(value.rank))]


def draw_reshape(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    way = builder.pick(["zeros", "minus", "split", "path", "flat"])
    if way == "flat":
        return [builder.add("Reshape", [value, builder.constant([-1])])]
    if way == "zeros":
        shape = [0] * value.rank
        if builder.flag():
            shape[builder.axis(value)] = -1
        if builder.flag():
            shape.append(1)
        return [builder.add("Reshape", [value, builder.constant(shape)])]
    if not value.is_batch_first:
        raise Unfit
    rest = math.prod(value.shape[1:])
    factor = builder.pick([n for n in range(1, rest + 1) if rest % n == 0])
    if way == "minus":
        return [builder.add("Reshape", [value, builder.constant([-1, factor, rest // factor])])]
    if way == "split":
        return [builder.add("Reshape", [value, builder.constant([0, rest // factor, factor])])]
    extent: dict[str, Any] = (
        {"start": 0, "end": 1} if builder.opset >= 15 and builder.flag() else {}
    )
    size = builder.add("Shape", [value], **extent)
    if not extent:
        index = builder.constant([0]) if builder.flag() else builder.constant(0)
        size = builder.add("Gather", [size, index], axis=0)
        if size.rank == 0:
            size = builder.unsqueeze(size, [0])
    shape_value = builder.add("Concat", [size, builder.constant([factor, -1])], axis=0)
    return [builder.add("Reshape", [value, shape_value])]


def draw_flatten(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    if builder.flag():
        return [builder.add("Flatten", [value])]
    least = -value.rank if builder.opset >= 11 else 0
    return [builder.add("Flatten", [value], axis=builder.number(least, value.rank))]


def draw_unsqueeze(builder: GraphBuilder) -> Made:
    value = builder.value(most_rank=4)
    count = builder.number(1, 2)
    axes = builder.order(value.rank + count)[:count]
    low = builder.opset >= 11
    axes = [axis - value.rank - count if low and builder.flag() else axis for axis in axes]
    return [builder.unsqueeze(value, axes)]


def draw_squeeze(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    ones = [axis for axis in value.fixed if value.shape[axis] == 1]
    if not ones:
        axis = builder.axis(value, fixed=True)
        value = builder.add("Gather", [value, builder.constant([0])], axis=axis)
        ones = [axis % value.rank]
    if builder.flag():
        return [builder.add("Squeeze", [value])]
    axes = [axis - value.rank if builder.opset >= 11 and builder.flag() else axis for axis in ones]
    if builder.opset >= 13:
        return [builder.add("Squeeze", [value, builder.constant(axes)])]
    return [builder.add("Squeeze", [value], axes=axes)]


def draw_concat(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    axis = builder.axis(value)

    def fits(other: Value) -> bool:
        pairs = zip(value.arrays, other.arrays, strict=True)
        at = axis % value.rank
        return other.rank == value.rank and all(
            one.shape[i] == two.shape[i] for one, two in pairs for i in range(one.ndim) if i != at
        )

    others = [other for other in builder.values if other.is_float and fits(other)]
    parts = [value, builder.pick(others)]
    if set(range(value.rank)) - {axis % value.rank} <= set(value.fixed) and builder.flag():
        shape = [*value.shape]
        shape[axis] = 2
        parts.append(builder.weight(*shape))
    if builder.flag():
        parts.reverse()
    return [builder.add("Concat", parts, axis=axis)]


def draw_split(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    axis = builder.axis(value, fixed=True)
    size = value.shape[axis]
    first = builder.number(1, size - 1)
    sizes = [first, size - first]
    if builder.opset >= 18 and builder.flag():
        return builder.add_several("Split", [value], 2, axis=axis, num_outputs=2)
    if builder.opset >= 13:
        return builder.add_several("Split", [value, builder.constant(sizes)], 2, axis=axis)
    return builder.add_several("Split", [value], 2, axis=axis, split=sizes)


def draw_slice(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    axes = builder.order(value.rank)[: builder.number(1, min(2, value.rank))]
    starts, ends, steps = [], [], []
    for axis in axes:
        step = builder.pick([1, 1, 2, -1, -2]) if builder.opset >= 10 else 1
        size = value.shape[axis]
        if step < 0:
            starts.append(builder.pick([-1, size, 2**31 - 1, size - 1]))
            ends.append(builder.pick([-(2**31), -size - 1, -(2**63) + 1, 0]))
        else:
            starts.append(builder.pick([0, 1, -1, -2, -size]))
            ends.append(builder.pick([2**31 - 1, 2**63 - 1, -1, size]))
        steps.append(step)
    if builder.opset < 10:
        return [builder.add("Slice", [value], axes=axes, starts=starts, ends=ends)]
    named = [axis - value.rank if builder.flag() else axis for axis in axes]
    inputs: list[Value | None] = [value, builder.constant(starts), builder.constant(ends)]
    if sorted(axes) == list(range(len(axes))) == axes and builder.flag():
        inputs.append(None)
    else:
        inputs.append(builder.constant(named))
    if any(step != 1 for step in steps) or builder.flag():
        inputs.append(builder.constant(steps))
    elif inputs[-1] is None:
        inputs.pop()
    return [builder.add("Slice", inputs)]


def draw_pad(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    modes = [None, "constant", "reflect", "edge"] + (["wrap"] if builder.opset >= 19 else [])
    mode = builder.pick(modes)
    pads = [0] * (2 * value.rank)
    for _ in range(builder.number(1, 3)):
        axis = builder.pick(value.fixed or range(value.rank))
        most = value.shape[axis] - 1 if mode in ("reflect", "wrap") else 2
        least = -1 if mode in (None, "constant") and value.shape[axis] > 2 else 0
        pads[axis + builder.pick([0, value.rank])] = builder.number(least, max(0, min(2, most)))
    filled = builder.pick([None, 0.5]) if mode in (None, "constant") else None
    if builder.opset < 11:
        return [builder.add("Pad", [value], mode=mode, pads=pads, value=filled)]
    inputs: list[Value | None] = [value, builder.constant(pads)]
    if filled is not None:
        inputs.append(builder.constant(filled, np.float32))
    if builder.opset >= 18 and builder.flag():
        axes = builder.order(value.rank)
        inputs[1] = builder.constant([pads[a + side] for side in (0, value.rank) for a in axes])
        inputs += [None] * (3 - len(inputs))
        inputs.append(builder.constant(axes))
    return [builder.add("Pad", inputs, mode=mode)]


def draw_repeat(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1, most_rank=4)
    if builder.flag():
        repeats = [builder.number(1, 2) for _ in range(value.rank)]
        return [builder.add("Tile", [value, builder.constant(repeats)])]
    shape = [builder.pick([1, 2]) if size == 1 else 1 for size in value.shape]
    if builder.flag():
        shape = [builder.number(1, 2), *shape]
    return [builder.add("Expand", [value, builder.constant(shape)])]


def draw_resize(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=3, most_rank=4)
    if builder.opset < 13 or not value.is_batch_first:
        raise Unfit
    mode = builder.pick([None, "nearest", "linear", "cubic"])
    attributes: dict[str, Any] = {
        "mode": mode,
        "coordinate_transformation_mode": builder.pick(
            [None, "half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"]
        ),
    }
    if mode in (None, "nearest"):
        ways = [None, "floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]
        attributes["nearest_mode"] = builder.pick(ways)
    if mode == "cubic":
        if value.rank != 4:
            raise Unfit
        attributes["cubic_coeff_a"] = builder.pick([None, -0.5])
        attributes["exclude_outside"] = builder.pick([None, 1])
    if builder.opset >= 18:
        if mode in ("linear", "cubic"):
            attributes["antialias"] = builder.pick([None, None, 1])
        scales = [builder.pick([2.0, 1.0, 1.5, 0.5]) for _ in range(value.rank - 2)]
        attributes["axes"] = list(range(2, value.rank))
    else:
        scales = [1.0, 1.0] + [builder.pick([2.0, 1.0, 1.5, 0.5]) for _ in range(value.rank - 2)]
    if builder.flag() and builder.opset >= 18:
        sizes = [builder.number(1, 6) for _ in range(value.rank - 2)]
        return [builder.add("Resize", [value, None, None, builder.constant(sizes)], **attributes)]
    return [
        builder.add("Resize", [value, None, builder.constant(scales, np.float32)], **attributes)
    ]


def draw_blocks(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=4, most_rank=4)
    value.need_fixed(1, 2, 3)
    if builder.flag() and value.shape[1] % 4 == 0:
        mode = builder.pick([None, "DCR", "CRD"]) if builder.opset >= 11 else None
        return [builder.add("DepthToSpace", [value], blocksize=2, mode=mode)]
    return [builder.add("SpaceToDepth", [value], blocksize=builder.pick([2, 1]))]


EQUATIONS = {
    1: ["i,i->", "i->i", "i,j->ij"],
    2: ["ij,kj->ik", "ij->ji", "ij,j->i", "ij->", "ij,ik->jk", "ii->i", "ij,kj"],
    3: ["bij,bkj->bik", "bij,jk->bik", "...ij,kj->...ik", "bij->bj", "bij,bij->b"],
    4: ["bhij,bhkj->bhik", "bhij->bhji", "bhij,j->bhi", "b...j->b..."],
}


def draw_einsum(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1, most_rank=4)
    if builder.opset < 12:
        raise Unfit
    equation = builder.pick(EQUATIONS[value.rank])
    terms = equation.split("->")[0].split(",")
    inputs = [value]
    if len(terms) == 2:
        sizes = dict(zip(terms[0].replace("...", "b"), value.shape, strict=True))
        held = dict(zip(terms[0].replace("...", "b"), range(value.rank), strict=True))
        shared = [held[letter] for letter in terms[1] if letter in held]
        if set(shared) <= set(value.fixed):
            shape = [sizes.get(letter, 2) for letter in terms[1]]
            inputs.append(builder.weight(*shape))
        else:
            inputs.append(value)
    return [builder.add("Einsum", inputs, equation=equation)]


def draw_shape_numbers(builder: GraphBuilder) -> Made:
    """Use the extents of a tensor as numbers, or a constant in its shape."""
    value = builder.value(least_rank=1)
    way = builder.pick(["scale", "zeros", "size"])
    if way == "zeros":
        filled = builder.pick([None, np.array([0.5], np.float32)])
        attributes = {}
        if filled is not None:
            attributes["value"] = numpy_helper.from_array(filled)
        made = builder.add("ConstantOfShape", [builder.add("Shape", [value])], **attributes)
        return [builder.add("Add", [made, value])]
    if way == "size":
        count = builder.add("Cast", [builder.add("Size", [value])], to=TensorProto.FLOAT)
        return [builder.add("Div", [value, count])]
    size = builder.add("Cast", [builder.add("Shape", [value])], to=TensorProto.FLOAT)
    size = builder.add("Gather", [size, builder.constant(builder.axis(value))], axis=0)
    return [builder.add("Mul", [value, builder.add("Sqrt", [size])])]


DRAWN: Sequence[Callable[[GraphBuilder], Made]] = (
    draw_transpose, draw_reshape, draw_flatten, draw_unsqueeze, draw_squeeze, draw_concat,
    draw_split, draw_slice, draw_slice, draw_pad, draw_pad, draw_repeat, draw_resize, draw_blocks,
    draw_einsum, draw_shape_numbers,
)  # fmt: skip
