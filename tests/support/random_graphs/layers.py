"""Draw layers with weights: products, convolutions, pools, normalizations, recurrent cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.support.random_graphs.drafts import DrawnModel, Unfit, Value

Made = Sequence[Value]


def draw_matmul(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=1)
    way = draft.pick(["right", "right", "left", "itself", "vector", "stack"])
    if way == "left" and value.rank >= 2:
        value.need_fixed(-2)
        return [draft.add("MatMul", [draft.weight(draft.number(1, 4), value.shape[-2]), value])]
    if way == "itself" and value.rank >= 2:
        order = [*range(value.rank - 2), value.rank - 1, value.rank - 2]
        turned = draft.add("Transpose", [value], perm=order)
        return [draft.add("MatMul", [value, turned] if draft.flag() else [turned, value])]
    value.need_fixed(-1)
    width = value.shape[-1]
    if way == "vector":
        return [draft.add("MatMul", [value, draft.weight(width)])]
    if way == "stack" and value.rank >= 3 and -3 % value.rank in value.fixed:
        weight = draft.weight(value.shape[-3], width, draft.number(1, 4))
        return [draft.add("MatMul", [value, weight])]
    return [draft.add("MatMul", [value, draft.weight(width, draft.number(1, 5))])]


def draw_scale(draft: DrawnModel) -> Made:
    value = draft.value()
    shape = [value.shape[a] if a in value.fixed and draft.flag() else 1 for a in range(value.rank)]
    return [draft.add(draft.pick(["Mul", "Mul", "Add"]), [value, draft.weight(*shape)])]


def draw_end(draft: DrawnModel) -> Made:
    """End with a weight that is certainly trained, after a tensor that depends on the batch."""
    value = draft.value()
    if len(value.fixed) == value.rank or not value.fixed:
        raise Unfit
    shape = [value.shape[axis] if axis in value.fixed else 1 for axis in range(value.rank)]
    array = np.random.default_rng(2).uniform(0.5, 1.5, shape).astype(np.float32)
    return [draft.add("Mul", [value, draft.store(array, "w")])]


def draw_gemm(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=2, most_rank=2)
    value.need_fixed(1)
    width, units = value.shape[1], draft.number(1, 5)
    trans_a, trans_b = draft.pick([None, 0, 1]), draft.pick([None, 1, 0])
    if trans_a:
        value = draft.add("Transpose", [value], perm=[1, 0])
    weight = draft.weight(units, width) if trans_b else draft.weight(width, units)
    inputs = [value, weight]
    if draft.opset < 11 or draft.flag():
        shape = draft.pick([(units,), (1, units), (1,), (), (1, 1)])
        inputs.append(draft.weight(*shape))
    alpha, beta = draft.pick([None, 0.5, 2.0]), draft.pick([None, 0.3, 0.0])
    return [draft.add("Gemm", inputs, transA=trans_a, transB=trans_b, alpha=alpha, beta=beta)]


def _draw_window(draft: DrawnModel, value: Value, kernel: Sequence[int]) -> dict[str, Any]:
    """Draw strides, dilations and padding of a window."""
    axes = range(len(kernel))
    window: dict[str, Any] = {}
    if draft.flag():
        window["strides"] = [draft.number(1, 2) for _ in axes]
    way = draft.pick(["none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
    if way == "pads":
        window["pads"] = [draft.number(0, kernel[axis] - 1) for axis in [*axes, *axes]]
    elif way != "none":
        window["auto_pad"] = way
    return window


def _draw_images(draft: DrawnModel, ranks: Sequence[int] = (3, 4, 5)) -> Value:
    value = draft.value(least_rank=min(ranks), most_rank=max(ranks))
    if not value.is_batch_first:
        raise Unfit
    return value


def _draw_dilations(draft: DrawnModel, count: int) -> list[int] | None:
    return [draft.number(1, 2) for _ in range(count)] if draft.flag() else None


def draw_convolution(draft: DrawnModel) -> Made:
    value = _draw_images(draft)
    channels, spatial = value.shape[1], value.rank - 2
    kernel = [draft.number(1, 3) for _ in range(spatial)]
    group = draft.pick([n for n in range(1, channels + 1) if channels % n == 0])
    dilations = _draw_dilations(draft, spatial)
    window = _draw_window(draft, value, kernel)
    if dilations and "auto_pad" in window and max(dilations) > 1:
        dilations = None  # the standard's reference ignores one of them
    each = draft.number(1, 3)
    if draft.flag():
        window["kernel_shape"] = kernel
    if draft.pick([False, False, True]):
        inputs = [value, draft.weight(channels, each, *kernel)]
        if draft.flag():
            inputs.append(draft.weight(each * group))
        return [draft.add("ConvTranspose", inputs, group=group, dilations=dilations, **window)]
    inputs = [value, draft.weight(each * group, channels // group, *kernel)]
    if draft.flag():
        inputs.append(draft.weight(each * group))
    return [draft.add("Conv", inputs, group=group, dilations=dilations, **window)]


def draw_pool(draft: DrawnModel) -> Made:
    value = _draw_images(draft)
    op = draft.pick(["MaxPool", "AveragePool", "LpPool", "global"])
    if op == "global":
        op = draft.pick(["GlobalAveragePool", "GlobalMaxPool"])
        return [draft.add(op, [value])]
    kernel = [draft.number(1, 3) for _ in range(value.rank - 2)]
    window = _draw_window(draft, value, kernel)
    since = {"MaxPool": 10, "AveragePool": 19, "LpPool": 18}[op]
    if draft.opset >= since:
        window["dilations"] = _draw_dilations(draft, len(kernel))
        if window["dilations"] and window.get("auto_pad", "VALID").startswith("SAME"):
            window["dilations"] = None
    if draft.opset >= max(10, since if op == "LpPool" else 10):
        window["ceil_mode"] = draft.pick([None, 0, 1])
    if op == "AveragePool":
        window["count_include_pad"] = draft.pick([None, 1, 0])
    if op == "LpPool":
        window["p"] = draft.pick([None, 1, 2, 3])
    return [draft.add(op, [value], kernel_shape=kernel, **window)]


def draw_normalization(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=2, most_rank=5)
    op = draft.pick(
        ["BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization",
         "LRN", "MeanVarianceNormalization"]
    )  # fmt: skip
    epsilon = draft.pick([None, 1e-3])
    if op == "LayerNormalization":
        axis = draft.pick([a for a in value.fixed if set(range(a, value.rank)) <= set(value.fixed)])
        shape = value.shape[axis:]
        weights = [draft.weight(*shape)] + ([draft.weight(*shape)] if draft.flag() else [])
        axis = axis - value.rank if draft.flag() else axis
        return [draft.add(op, [value, *weights], axis=axis, epsilon=epsilon)]
    if not value.is_batch_first:
        raise Unfit
    channels = value.shape[1]
    if op == "LRN":
        if value.rank != 4:
            raise Unfit
        return [draft.add(op, [value], size=draft.pick([1, 3]), alpha=draft.pick([None, 0.1]),
                          bias=draft.pick([None, 2.0]))]  # fmt: skip
    if op == "MeanVarianceNormalization":
        axes = None if value.rank == 4 and draft.flag() else [0, *range(2, value.rank)]
        return [draft.add(op, [value], axes=axes)]
    if op == "InstanceNormalization":
        if value.rank < 3:
            raise Unfit
        weights = [draft.weight(channels), draft.weight(channels)]
        return [draft.add(op, [value, *weights], epsilon=epsilon)]
    if op == "GroupNormalization":
        if value.rank < 3 or draft.opset < 21:
            raise Unfit
        group = draft.pick([n for n in range(1, channels + 1) if channels % n == 0])
        weights = [draft.weight(channels), draft.weight(channels)]
        return [draft.add(op, [value, *weights], num_groups=group, epsilon=epsilon)]
    random = np.random.default_rng(5)
    given = [
        draft.weight(channels),
        draft.weight(channels),
        draft.store(random.standard_normal(channels).astype(np.float32) * np.float32(0.3), "mean"),
        draft.store(random.uniform(0.5, 2, channels).astype(np.float32), "var"),
    ]
    momentum = draft.pick([None, 0.8])
    if draft.opset >= 14 and draft.flag():
        return draft.add_several(
            op, [value, *given], 3, epsilon=epsilon, momentum=momentum, training_mode=1
        )[:1]
    return [draft.add(op, [value, *given], epsilon=epsilon, momentum=momentum)]


def draw_recurrence(draft: DrawnModel) -> Made:
    value = draft.value(least_rank=3, most_rank=3)
    op = draft.pick(["LSTM", "GRU", "RNN"])
    direction = draft.pick([None, "forward", "reverse", "bidirectional"])
    both = 2 if direction == "bidirectional" else 1
    layout = draft.pick([0, 1]) if draft.opset >= 14 else 0
    if not value.is_batch_first:
        raise Unfit
    if layout == 0:
        value = draft.add("Transpose", [value], perm=[1, 0, 2])
    width, hidden = value.shape[2], draft.number(1, 3)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    inputs: list[Value | None] = [
        value,
        draft.weight(both, gates * hidden, width),
        draft.weight(both, gates * hidden, hidden),
    ]
    if draft.flag():
        inputs.append(draft.weight(both, 2 * gates * hidden))
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if layout:
        attributes["layout"] = 1
    if op == "RNN":
        attributes["activations"] = draft.pick([None, ["Relu"] * both])
    if op == "GRU":
        attributes["linear_before_reset"] = draft.pick([None, 0, 1])
    count = draft.number(1, 2)
    return draft.add_several(op, inputs, count, **attributes)


DRAWN: Sequence[Callable[[DrawnModel], Made]] = (
    draw_matmul, draw_matmul, draw_gemm, draw_convolution, draw_pool, draw_normalization,
    draw_normalization, draw_recurrence, draw_convolution, draw_gemm,
)  # fmt: skip
