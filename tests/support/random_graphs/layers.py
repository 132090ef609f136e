"""Draw layers with weights: products, convolutions, pools, normalizations, recurrent cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.support.random_graphs.builders import GraphBuilder, Unfit, Value

Made = Sequence[Value]


def draw_matmul(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=1)
    way = builder.pick(["right", "right", "left", "itself", "vector", "stack"])
    if way == "left" and value.rank >= 2:
        value.need_fixed(-2)
        return [
            builder.add("MatMul", [builder.weight(builder.number(1, 4), value.shape[-2]), value])
        ]
    if way == "itself" and value.rank >= 2:
        order = [*range(value.rank - 2), value.rank - 1, value.rank - 2]
        turned = builder.add("Transpose", [value], perm=order)
        return [builder.add("MatMul", [value, turned] if builder.flag() else [turned, value])]
    value.need_fixed(-1)
    width = value.shape[-1]
    if way == "vector":
        return [builder.add("MatMul", [value, builder.weight(width)])]
    if way == "stack" and value.rank >= 3 and -3 % value.rank in value.fixed:
        weight = builder.weight(value.shape[-3], width, builder.number(1, 4))
        return [builder.add("MatMul", [value, weight])]
    return [builder.add("MatMul", [value, builder.weight(width, builder.number(1, 5))])]


def draw_scale(builder: GraphBuilder) -> Made:
    value = builder.value()
    shape = [
        value.shape[a] if a in value.fixed and builder.flag() else 1 for a in range(value.rank)
    ]
    return [builder.add(builder.pick(["Mul", "Mul", "Add"]), [value, builder.weight(*shape)])]


def draw_end(builder: GraphBuilder) -> Made:
    """End with a weight that is certainly trained, after a tensor that depends on the batch."""
    value = builder.value()
    if len(value.fixed) == value.rank or not value.fixed:
        raise Unfit
    shape = [value.shape[axis] if axis in value.fixed else 1 for axis in range(value.rank)]
    array = np.random.default_rng(2).uniform(0.5, 1.5, shape).astype(np.float32)
    return [builder.add("Mul", [value, builder.store(array, "w")])]


def draw_gemm(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=2, most_rank=2)
    value.need_fixed(1)
    width, units = value.shape[1], builder.number(1, 5)
    trans_a, trans_b = builder.pick([None, 0, 1]), builder.pick([None, 1, 0])
    if trans_a:
        value = builder.add("Transpose", [value], perm=[1, 0])
    weight = builder.weight(units, width) if trans_b else builder.weight(width, units)
    inputs = [value, weight]
    if builder.opset < 11 or builder.flag():
        shape = builder.pick([(units,), (1, units), (1,), (), (1, 1)])
        inputs.append(builder.weight(*shape))
    alpha, beta = builder.pick([None, 0.5, 2.0]), builder.pick([None, 0.3, 0.0])
    return [builder.add("Gemm", inputs, transA=trans_a, transB=trans_b, alpha=alpha, beta=beta)]


def _draw_window(builder: GraphBuilder, value: Value, kernel: Sequence[int]) -> dict[str, Any]:
    """Draw strides, dilations and padding of a window."""
    axes = range(len(kernel))
    window: dict[str, Any] = {}
    if builder.flag():
        window["strides"] = [builder.number(1, 2) for _ in axes]
    way = builder.pick(["none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
    if way == "pads":
        window["pads"] = [builder.number(0, kernel[axis] - 1) for axis in [*axes, *axes]]
    elif way != "none":
        window["auto_pad"] = way
    return window


def _draw_images(builder: GraphBuilder, ranks: Sequence[int] = (3, 4, 5)) -> Value:
    value = builder.value(least_rank=min(ranks), most_rank=max(ranks))
    if not value.is_batch_first:
        raise Unfit
    return value


def _draw_dilations(builder: GraphBuilder, count: int) -> list[int] | None:
    return [builder.number(1, 2) for _ in range(count)] if builder.flag() else None


def draw_convolution(builder: GraphBuilder) -> Made:
    value = _draw_images(builder)
    channels, spatial = value.shape[1], value.rank - 2
    kernel = [builder.number(1, 3) for _ in range(spatial)]
    group = builder.pick([n for n in range(1, channels + 1) if channels % n == 0])
    dilations = _draw_dilations(builder, spatial)
    window = _draw_window(builder, value, kernel)
    if dilations and "auto_pad" in window and max(dilations) > 1:
        dilations = None  # the standard's reference ignores one of them
    each = builder.number(1, 3)
    if builder.flag():
        window["kernel_shape"] = kernel
    if builder.pick([False, False, True]):
        inputs = [value, builder.weight(channels, each, *kernel)]
        if builder.flag():
            inputs.append(builder.weight(each * group))
        return [builder.add("ConvTranspose", inputs, group=group, dilations=dilations, **window)]
    inputs = [value, builder.weight(each * group, channels // group, *kernel)]
    if builder.flag():
        inputs.append(builder.weight(each * group))
    return [builder.add("Conv", inputs, group=group, dilations=dilations, **window)]


def draw_pool(builder: GraphBuilder) -> Made:
    value = _draw_images(builder)
    op = builder.pick(["MaxPool", "AveragePool", "LpPool", "global"])
    if op == "global":
        op = builder.pick(["GlobalAveragePool", "GlobalMaxPool"])
        return [builder.add(op, [value])]
    kernel = [builder.number(1, 3) for _ in range(value.rank - 2)]
    window = _draw_window(builder, value, kernel)
    if op == "MaxPool" and window.get("auto_pad", "").startswith("SAME"):
        window.pop("strides", None)  # onnx's own evaluator rounds the number of windows down
    since = {"MaxPool": 10, "AveragePool": 19, "LpPool": 18}[op]
    if builder.opset >= since:
        window["dilations"] = _draw_dilations(builder, len(kernel))
        if window["dilations"] and window.get("auto_pad", "VALID").startswith("SAME"):
            window["dilations"] = None
    if builder.opset >= max(10, since if op == "LpPool" else 10):
        window["ceil_mode"] = builder.pick([None, 0, 1])
    if op == "AveragePool":
        window["count_include_pad"] = builder.pick([None, 1, 0])
    if op == "LpPool":
        window["p"] = builder.pick([None, 1, 2, 3])
    return [builder.add(op, [value], kernel_shape=kernel, **window)]


def draw_normalization(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=2, most_rank=5)
    op = builder.pick(
        ["BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization",
         "LRN", "MeanVarianceNormalization"]
    )  # fmt: skip
    epsilon = builder.pick([None, 1e-3])
    if op == "LayerNormalization":
        axis = builder.pick(
            [a for a in value.fixed if set(range(a, value.rank)) <= set(value.fixed)]
        )
        shape = value.shape[axis:]
        weights = [builder.weight(*shape)] + ([builder.weight(*shape)] if builder.flag() else [])
        axis = axis - value.rank if builder.flag() else axis
        return [builder.add(op, [value, *weights], axis=axis, epsilon=epsilon)]
    if not value.is_batch_first:
        raise Unfit
    channels = value.shape[1]
    if op == "LRN":
        if value.rank != 4:
            raise Unfit
        return [builder.add(op, [value], size=builder.pick([1, 3]), alpha=builder.pick([None, 0.1]),
                          bias=builder.pick([None, 2.0]))]  # fmt: skip
    if op == "MeanVarianceNormalization":
        axes = None if value.rank == 4 and builder.flag() else [0, *range(2, value.rank)]
        return [builder.add(op, [value], axes=axes)]
    if op == "InstanceNormalization":
        if value.rank < 3:
            raise Unfit
        weights = [builder.weight(channels), builder.weight(channels)]
        return [builder.add(op, [value, *weights], epsilon=epsilon)]
    if op == "GroupNormalization":
        if value.rank < 3 or builder.opset < 21:
            raise Unfit
        group = builder.pick([n for n in range(1, channels + 1) if channels % n == 0])
        weights = [builder.weight(channels), builder.weight(channels)]
        return [builder.add(op, [value, *weights], num_groups=group, epsilon=epsilon)]
    random = np.random.default_rng(5)
    given = [
        builder.weight(channels),
        builder.weight(channels),
        builder.store(
            random.standard_normal(channels).astype(np.float32) * np.float32(0.3), "mean"
        ),
        builder.store(random.uniform(0.5, 2, channels).astype(np.float32), "var"),
    ]
    momentum = builder.pick([None, 0.8])
    if builder.opset >= 14 and builder.flag():
        return builder.add_several(
            op, [value, *given], 3, epsilon=epsilon, momentum=momentum, training_mode=1
        )[:1]
    return [builder.add(op, [value, *given], epsilon=epsilon, momentum=momentum)]


def draw_recurrence(builder: GraphBuilder) -> Made:
    value = builder.value(least_rank=3, most_rank=3)
    op = builder.pick(["LSTM", "GRU", "RNN"])
    direction = builder.pick([None, "forward", "reverse", "bidirectional"])
    both = 2 if direction == "bidirectional" else 1
    layout = builder.pick([0, 1]) if builder.opset >= 14 else 0
    if not value.is_batch_first:
        raise Unfit
    if layout == 0:
        value = builder.add("Transpose", [value], perm=[1, 0, 2])
    width, hidden = value.shape[2], builder.number(1, 3)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    inputs: list[Value | None] = [
        value,
        builder.weight(both, gates * hidden, width),
        builder.weight(both, gates * hidden, hidden),
    ]
    if builder.flag():
        inputs.append(builder.weight(both, 2 * gates * hidden))
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if layout:
        attributes["layout"] = 1
    if op == "RNN":
        attributes["activations"] = builder.pick([None, ["Relu"] * both])
    if op == "GRU":
        attributes["linear_before_reset"] = builder.pick([None, 0, 1])
    count = builder.number(1, 2)
    return builder.add_several(op, inputs, count, **attributes)


DRAWN: Sequence[Callable[[GraphBuilder], Made]] = (
    draw_matmul, draw_matmul, draw_gemm, draw_convolution, draw_pool, draw_normalization,
    draw_normalization, draw_recurrence, draw_convolution, draw_gemm,
)  # fmt: skip
