"""Draw operators that work element by element, reductions and normalizations along an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from tests.support.random_graphs.builders import GraphBuilder, Unfit, Value

PLAIN: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "Relu": {},
    "LeakyRelu": {"alpha": [None, 0.3]},
    "Elu": {"alpha": [None, 0.5]},
    "Selu": {"alpha": [None, 1.2], "gamma": [None, 0.9]},
    "Celu": {"alpha": [None, 0.7]},
    "HardSigmoid": {"alpha": [None, 0.3], "beta": [None, 0.4]},
    "HardSwish": {},
    "Sigmoid": {},
    "Tanh": {},
    "Softplus": {},
    "Softsign": {},
    "Mish": {},
    "Gelu": {"approximate": [None, "none", "tanh"]},
    "ThresholdedRelu": {"alpha": [None, 0.2]},
    "Shrink": {"bias": [None, 0.1], "lambd": [None, 0.2]},
    "Erf": {},
    "Abs": {},
    "Neg": {},
    "Sin": {},
    "Cos": {},
    "Atan": {},
    "Asinh": {},
    "Floor": {},
    "Ceil": {},
    "Round": {},
    "Sign": {},
    "Identity": {},
    "IsNaN": {},
    "Dropout": {},
    "Exp": {},
    "Sinh": {},
    "Cosh": {},
}
"""Operators with one input, and what their attributes may be; ``None`` leaves one out."""
BOUNDED = ("Acos", "Asin", "Atanh", "Tan", "Exp", "Sinh", "Cosh")
"""Operators applied to what lies between -0.9 and 0.9."""
POSITIVE = ("Log", "Sqrt", "Reciprocal", "Acosh")
"""Operators applied to numbers above 1."""
REDUCTIONS = (
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip

Made = Sequence[Value]


def draw_plain(builder: GraphBuilder) -> Made:
    op = builder.pick(list(PLAIN))
    attributes = {name: builder.pick(held) for name, held in PLAIN[op].items()}
    made = builder.add(op, [builder.value()], **attributes)
    if op == "IsNaN":
        made = builder.add("Cast", [made], to=TensorProto.FLOAT)
    return [made]


def draw_bounded(builder: GraphBuilder) -> Made:
    bounded = builder.add("Tanh", [builder.value()])
    bounded = builder.add("Mul", [bounded, builder.constant(0.9, np.float32)])
    return [builder.add(builder.pick(BOUNDED), [bounded])]


def draw_positive(builder: GraphBuilder) -> Made:
    above = builder.add(
        "Add", [builder.add("Abs", [builder.value()]), builder.constant(1.1, np.float32)]
    )
    return [builder.add(builder.pick(POSITIVE), [above])]


def draw_partner(builder: GraphBuilder, value: Value, *, low: float | None = None) -> Value:
    """Draw a tensor that broadcasts with ``value``: another of the model, or a weight."""
    if builder.flag():
        others = [v for v in builder.values if v.is_float and _broadcasts(v, value)]
        if others and low is None:
            return builder.pick(others)
    kept = builder.number(0, value.rank)
    shape = [
        value.shape[axis] if axis in value.fixed and not builder.flag() else 1
        for axis in range(value.rank - kept, value.rank)
    ]
    return builder.weight(*shape, low=low)


def _broadcasts(one: Value, other: Value) -> bool:
    try:
        for first, second in zip(one.arrays, other.arrays, strict=True):
            np.broadcast_shapes(first.shape, second.shape)
    except ValueError:
        return False
    return True


def draw_binary(builder: GraphBuilder) -> Made:
    op, value = builder.pick(["Add", "Mul", "Sub", "Max", "Min", "Sum", "Mean"]), builder.value()
    pair = [value, draw_partner(builder, value)]
    if builder.flag():
        pair.reverse()
    if op in ("Max", "Min", "Sum", "Mean") and builder.flag():
        pair.append(draw_partner(builder, pair[1]))
    return [builder.add(op, pair)]


def draw_division(builder: GraphBuilder) -> Made:
    value = builder.value()
    op = builder.pick(["Div", "Mod", "Pow", "Pow"])
    if op == "Div":
        return [builder.add(op, [value, draw_partner(builder, value, low=0.5)])]
    if op == "Mod":
        return [builder.add(op, [value, draw_partner(builder, value, low=0.5)], fmod=1)]
    if builder.flag():
        exponent = builder.pick([2.0, 3.0, 1.0, 0.0])
        kind = builder.pick([np.float32, np.int64]) if builder.opset >= 12 else np.float32
        return [builder.add("Pow", [value, builder.constant(exponent, kind)])]
    above = builder.add("Add", [builder.add("Abs", [value]), builder.constant(0.5, np.float32)])
    return [builder.add("Pow", [above, draw_partner(builder, above)])]


def draw_slope(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    shape = [
        value.shape[a] if a in value.fixed and builder.flag() else 1 for a in range(value.rank)
    ]
    return [
        builder.add("PRelu", [value, builder.weight(*shape[builder.number(0, value.rank - 1) :])])
    ]


def draw_clip(builder: GraphBuilder) -> Made:
    value, low, high = (
        builder.value(),
        builder.pick([None, -0.5, 0.0]),
        builder.pick([None, 1.0, 0.4]),
    )
    if builder.opset < 11:
        return [builder.add("Clip", [value], min=low, max=high)]
    limits = [
        None if limit is None else builder.constant(limit, np.float32) for limit in (low, high)
    ]
    while limits and limits[-1] is None:
        limits.pop()
    return [builder.add("Clip", [value, *limits])]


def draw_choice(builder: GraphBuilder) -> Made:
    """Compare two tensors, and use the truth values to choose between others or as numbers."""
    value = builder.value()
    kinds = ["Greater", "Less", "GreaterOrEqual", "LessOrEqual", "mask"]
    op = builder.pick(kinds)
    if op == "mask":
        if not value.is_batch_first:
            raise Unfit
        condition = builder.input(np.bool_, value.shape[1:])
    else:
        condition = builder.add(op, [value, draw_partner(builder, value)])
    second = builder.pick(["", "Not", "And", "Or", "Xor"])
    if second == "Not":
        condition = builder.add("Not", [condition])
    elif second:
        other = builder.add("Less", [value, builder.constant(0.3, np.float32)])
        condition = builder.add(second, [condition, other])
    if builder.flag():
        number = builder.add("Cast", [condition], to=TensorProto.FLOAT)
        return [builder.add("Mul", [value, number])]
    pair = [value, draw_partner(builder, value)]
    if builder.flag():
        pair.reverse()
    return [builder.add("Where", [condition, *pair])]


def draw_cast(builder: GraphBuilder) -> Made:
    value = builder.value()
    kind = builder.pick(
        [TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL]
    )
    there = builder.add("Cast", [value], to=kind)
    if kind == TensorProto.DOUBLE and builder.flag():
        there = builder.add("Mul", [there, there])
    return [builder.add("Cast", [there], to=TensorProto.FLOAT)]


def draw_along_axis(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    op = builder.pick(["Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "CumSum"])
    if op == "CumSum":
        place = builder.constant(builder.axis(value), builder.pick([np.int64, np.int32]))
        reverse, exclusive = builder.number(0, 1), builder.number(0, 1)
        return [builder.add(op, [value, place], reverse=reverse, exclusive=exclusive)]
    axis = (
        None if builder.flag() and (value.rank > 1 or builder.opset >= 13) else builder.axis(value)
    )
    if op == "LpNormalization":
        return [builder.add(op, [value], axis=axis, p=builder.pick([None, 1, 2]))]
    return [builder.add(op, [value], axis=axis)]


def draw_reduction(builder: GraphBuilder) -> Made:
    value, op = builder.value(least_rank=1), builder.pick(REDUCTIONS)
    if op == "ReduceLogSum":
        value = builder.add("Add", [builder.add("Abs", [value]), builder.constant(0.1, np.float32)])
    chosen = builder.order(value.rank)[: builder.number(0, value.rank)]
    axes = [axis - value.rank if builder.flag() else axis for axis in chosen]
    keep = builder.pick([None, 0, 1])
    if builder.opset >= (13 if op == "ReduceSum" else 18):
        empty = builder.pick([None, 0, 1])
        given = [value] if not axes and builder.flag() else [value, builder.constant(axes)]
        return [builder.add(op, given, keepdims=keep, noop_with_empty_axes=empty)]
    return [builder.add(op, [value], axes=axes or None, keepdims=keep)]


def draw_place(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    op = builder.pick(["ArgMax", "ArgMin", "TopK"])
    if op == "TopK":
        axis = builder.axis(value, fixed=True)
        count = builder.number(1, value.shape[axis])
        largest, ordered = builder.pick([None, 1, 0]), builder.pick([None, 1])
        if builder.opset < 11:
            raise Unfit
        values, places = builder.add_several(
            op, [value, builder.constant([count])], 2, axis=axis, largest=largest, sorted=ordered
        )
        if builder.flag():
            return [values]
        return [values, builder.add("Cast", [places], to=TensorProto.FLOAT)]
    last = builder.pick([None, 1]) if builder.opset >= 12 else None
    made = builder.add(
        op,
        [value],
        axis=builder.axis(value),
        keepdims=builder.pick([None, 0]),
        select_last_index=last,
    )
    return [builder.add("Cast", [made], to=TensorProto.FLOAT)]


def draw_triangle(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=2)
    upper = builder.pick([None, 0, 1])
    offset = [builder.constant(builder.number(-2, 2))] if builder.flag() else []
    return [builder.add("Trilu", [value, *offset], upper=upper)]


DRAWN: Sequence[Callable[[GraphBuilder], Made]] = (
    draw_plain, draw_binary, draw_plain, draw_bounded, draw_positive, draw_division, draw_slope,
    draw_clip, draw_choice, draw_cast, draw_along_axis, draw_reduction, draw_reduction, draw_place,
    draw_triangle,
)  # fmt: skip
