"""Draw operators that work element by element, reductions and normalizations along an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from tests.support.random_graphs.drafts import DrawnModel, Unfit, Value

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


def draw_plain(draft: DrawnModel) -> Made:
    op = draft.pick(list(PLAIN))
    attributes = {name: draft.pick(held) for name, held in PLAIN[op].items()}
    made = draft.add(op, [draft.value()], **attributes)
    if op == "IsNaN":
        made = draft.add("Cast", [made], to=TensorProto.FLOAT)
    return [made]


def draw_bounded(draft: DrawnModel) -> Made:
    bounded = draft.add("Tanh", [draft.value()])
    bounded = draft.add("Mul", [bounded, draft.constant(0.9, np.float32)])
    return [draft.add(draft.pick(BOUNDED), [bounded])]


def draw_positive(draft: DrawnModel) -> Made:
    above = draft.add("Add", [draft.add("Abs", [draft.value()]), draft.constant(1.1, np.float32)])
    return [draft.add(draft.pick(POSITIVE), [above])]


def draw_partner(draft: DrawnModel, value: Value, *, low: float | None = None) -> Value:
    """Draw a tensor that broadcasts with ``value``: another of the model, or a weight."""
    if draft.flag():
        others = [v for v in draft.values if v.is_float and _broadcasts(v, value)]
        if others and low is None:
            return draft.pick(others)
    kept = draft.number(0, value.rank)
    shape = [
        value.shape[axis] if axis in value.fixed and not draft.flag() else 1
        for axis in range(value.rank - kept, value.rank)
    ]
    return draft.weight(*shape, low=low)


def _broadcasts(one: Value, other: Value) -> bool:
    try:
        for first, second in zip(one.arrays, other.arrays, strict=True):
            np.broadcast_shapes(first.shape, second.shape)
    except ValueError:
        return False
    return True


def draw_binary(draft: DrawnModel) -> Made:
    op, value = draft.pick(["Add", "Mul", "Sub", "Max", "Min", "Sum", "Mean"]), draft.value()
    pair = [value, draw_partner(draft, value)]
    if draft.flag():
        pair.reverse()
    if op in ("Max", "Min", "Sum", "Mean") and draft.flag():
        pair.append(draw_partner(draft, pair[1]))
    return [draft.add(op, pair)]


def draw_division(draft: DrawnModel) -> Made:
    value = draft.value()
    op = draft.pick(["Div", "Mod", "Pow", "Pow"])
    if op == "Div":
        return [draft.add(op, [value, draw_partner(draft, value, low=0.5)])]
    if op == "Mod":
        return [draft.add(op, [value, draw_partner(draft, value, low=0.5)], fmod=1)]
    if draft.flag():
        exponent = draft.pick([2.0, 3.0, 1.0, 0.0])
        kind = draft.pick([np.float32, np.int64]) if draft.opset >= 12 else np.float32
        return [draft.add("Pow", [value, draft.constant(exponent, kind)])]
    above = draft.add("Add", [draft.add("Abs", [value]), draft.constant(0.5, np.float32)])
    return [draft.add("Pow", [above, draw_partner(draft, above)])]


def draw_slope(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    shape = [value.shape[a] if a in value.fixed and draft.flag() else 1 for a in range(value.rank)]
    return [draft.add("PRelu", [value, draft.weight(*shape[draft.number(0, value.rank - 1) :])])]


def draw_clip(draft: DrawnModel) -> Made:
    value, low, high = draft.value(), draft.pick([None, -0.5, 0.0]), draft.pick([None, 1.0, 0.4])
    if draft.opset < 11:
        return [draft.add("Clip", [value], min=low, max=high)]
    limits = [None if limit is None else draft.constant(limit, np.float32) for limit in (low, high)]
    while limits and limits[-1] is None:
        limits.pop()
    return [draft.add("Clip", [value, *limits])]


def draw_choice(draft: DrawnModel) -> Made:
    """Compare two tensors, and use the truth values to choose between others or as numbers."""
    value = draft.value()
    kinds = ["Greater", "Less", "GreaterOrEqual", "LessOrEqual", "mask"]
    op = draft.pick(kinds)
    if op == "mask":
        if not value.is_batch_first:
            raise Unfit
        condition = draft.input(np.bool_, value.shape[1:])
    else:
        condition = draft.add(op, [value, draw_partner(draft, value)])
    second = draft.pick(["", "Not", "And", "Or", "Xor"])
    if second == "Not":
        condition = draft.add("Not", [condition])
    elif second:
        other = draft.add("Less", [value, draft.constant(0.3, np.float32)])
        condition = draft.add(second, [condition, other])
    if draft.flag():
        number = draft.add("Cast", [condition], to=TensorProto.FLOAT)
        return [draft.add("Mul", [value, number])]
    pair = [value, draw_partner(draft, value)]
    if draft.flag():
        pair.reverse()
    return [draft.add("Where", [condition, *pair])]


def draw_cast(draft: DrawnModel) -> Made:
    value = draft.value()
    kind = draft.pick([TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL])
    there = draft.add("Cast", [value], to=kind)
    if kind == TensorProto.DOUBLE and draft.flag():
        there = draft.add("Mul", [there, there])
    return [draft.add("Cast", [there], to=TensorProto.FLOAT)]


def draw_along_axis(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    op = draft.pick(["Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "CumSum"])
    if op == "CumSum":
        place = draft.constant(draft.axis(value), draft.pick([np.int64, np.int32]))
        reverse, exclusive = draft.number(0, 1), draft.number(0, 1)
        return [draft.add(op, [value, place], reverse=reverse, exclusive=exclusive)]
    axis = None if draft.flag() and (value.rank > 1 or draft.opset >= 13) else draft.axis(value)
    if op == "LpNormalization":
        return [draft.add(op, [value], axis=axis, p=draft.pick([None, 1, 2]))]
    return [draft.add(op, [value], axis=axis)]


def draw_reduction(draft: DrawnModel) -> Made:
    value, op = draft.value(least_rank=1), draft.pick(REDUCTIONS)
    if op == "ReduceLogSum":
        value = draft.add("Add", [draft.add("Abs", [value]), draft.constant(0.1, np.float32)])
    chosen = draft.order(value.rank)[: draft.number(0, value.rank)]
    axes = [axis - value.rank if draft.flag() else axis for axis in chosen]
    keep = draft.pick([None, 0, 1])
    if draft.opset >= (13 if op == "ReduceSum" else 18):
        empty = draft.pick([None, 0, 1])
        given = [value] if not axes and draft.flag() else [value, draft.constant(axes)]
        return [draft.add(op, given, keepdims=keep, noop_with_empty_axes=empty)]
    return [draft.add(op, [value], axes=axes or None, keepdims=keep)]


def draw_place(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    op = draft.pick(["ArgMax", "ArgMin", "TopK"])
    if op == "TopK":
        axis = draft.axis(value, fixed=True)
        count = draft.number(1, value.shape[axis])
        largest, ordered = draft.pick([None, 1, 0]), draft.pick([None, 1])
        if draft.opset < 11:
            raise Unfit
        values, places = draft.add_several(
            op, [value, draft.constant([count])], 2, axis=axis, largest=largest, sorted=ordered
        )
        if draft.flag():
            return [values]
        return [values, draft.add("Cast", [places], to=TensorProto.FLOAT)]
    last = draft.pick([None, 1]) if draft.opset >= 12 else None
    made = draft.add(
        op, [value], axis=draft.axis(value), keepdims=draft.pick([None, 0]), select_last_index=last
    )
    return [draft.add("Cast", [made], to=TensorProto.FLOAT)]


def draw_triangle(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=2)
    upper = draft.pick([None, 0, 1])
    offset = [draft.constant(draft.number(-2, 2))] if draft.flag() else []
    return [draft.add("Trilu", [value, *offset], upper=upper)]


DRAWN: Sequence[Callable[[DrawnModel], Made]] = (
    draw_plain, draw_binary, draw_plain, draw_bounded, draw_positive, draw_division, draw_slope,
    draw_clip, draw_choice, draw_cast, draw_along_axis, draw_reduction, draw_reduction, draw_place,
    draw_triangle,
)  # fmt: skip
