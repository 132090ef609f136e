"""Rewrite activation functions so that they can be differentiated.

The replacements stay accurate for large inputs and have a gradient at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, take_input
from splitonnx.partitioner.rewrites.tangents import Tangent, follow_tangents

Values = Sequence[ir.Value]

_SELU = (1.67326319217681884765625, 1.05070102214813232421875)
"""alpha and gamma, with the digits that Selu's definition gives."""


def _bend(
    builder: NodeBuilder, node: ir.Node, above: float, below: float, width: float = 1.0
) -> Sequence[ir.Value]:
    """Keep the operator and attach its slope: ``above`` for x > 0, else below * exp(x / width)."""
    x = take_input(node)
    point = builder.detach(x)
    value = builder.ops(node.op_type, [point], 1, dict(node.attributes))[0]
    zero = builder.number(0.0, x.dtype)
    negative = builder.op("Min", point, zero)
    if width != 1.0:
        negative = builder.op("Div", negative, builder.number(width, x.dtype))
    curve = builder.op("Exp", negative)
    if below != 1.0:
        curve = builder.op("Mul", curve, builder.number(below, x.dtype))
    slope = builder.op(
        "Where", builder.op("Greater", point, zero), builder.number(above, x.dtype), curve
    )
    return [follow_tangents(builder, value, [Tangent(source=x, point=point, slope=slope)])]


def rewrite_celu(builder: NodeBuilder, node: ir.Node) -> Values:
    """Keep Celu and attach its derivative, which is 1 if x > 0 and exp(x / alpha) otherwise.

    Here ``alpha`` is an attribute of the node.  onnxruntime-training has no gradient for Celu, so
    its derivative is attached explicitly (see :mod:`tangents`).
    """
    return _bend(builder, node, 1.0, 1.0, node.attributes.get_float("alpha", 1.0))


def rewrite_elu(builder: NodeBuilder, node: ir.Node) -> Values:
    """Keep Elu and attach its derivative, which is 1 if x > 0 and alpha * exp(x) otherwise.

    Here ``alpha`` is an attribute of the node.  onnxruntime-training has no gradient for Elu, so
    its derivative is attached explicitly (see :mod:`tangents`).
    """
    return _bend(builder, node, 1.0, node.attributes.get_float("alpha", 1.0))


def rewrite_selu(builder: NodeBuilder, node: ir.Node) -> Values:
    """Keep Selu and attach its derivative.

    The derivative is gamma if x > 0, and gamma * alpha * exp(x) otherwise, where ``gamma`` and
    ``alpha`` are attributes of the node.  onnxruntime-training has no gradient for Selu, so its
    derivative is attached explicitly (see :mod:`tangents`).
    """
    alpha = node.attributes.get_float("alpha", _SELU[0])
    gamma = node.attributes.get_float("gamma", _SELU[1])
    return _bend(builder, node, gamma, gamma * alpha)


def rewrite_softplus(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Softplus, log(1 + exp(x)), with Relu, Exp and Log.

    onnxruntime-training has no gradient for Softplus.  With m = max(x, 0), the formula is:

    m + log(exp(-m) + exp(x - m)).

    One of the two exponentials is always 1, and neither can overflow.  The derivative at 0 is 1/2,
    regardless of the derivative of Relu at 0.  Keeping the Softplus operator and attaching its
    derivative would take 1.7 times as long.
    """
    x = take_input(node)
    positive = builder.op("Relu", x)
    powers = [
        builder.op("Exp", builder.op("Neg", positive)),
        builder.op("Exp", builder.op("Sub", x, positive)),
    ]
    return [builder.op("Add", positive, builder.op("Log", builder.op("Add", *powers)))]


def rewrite_mish(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Mish as x * tanh(softplus(x)).

    onnxruntime-training has no gradient for Mish.
    """
    x = take_input(node)
    return [builder.op("Mul", x, builder.op("Tanh", builder.op("Softplus", x)))]


def rewrite_softsign(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Softsign as x / (1 + |x|).

    onnxruntime-training has no gradient for Softsign.
    """
    x = take_input(node)
    spread = builder.op("Add", builder.op("Abs", x), builder.number(1.0, x.dtype))
    return [builder.op("Div", x, spread)]


def _clip_line(builder: NodeBuilder, x: ir.Value, alpha: float, beta: float) -> ir.Value:
    line = builder.op("Mul", x, builder.number(alpha, x.dtype))
    line = builder.op("Add", line, builder.number(beta, x.dtype))
    return builder.op("Clip", line, builder.number(0.0, x.dtype), builder.number(1.0, x.dtype))


def rewrite_hard_sigmoid(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite HardSigmoid as clip(alpha * x + beta, 0, 1).

    Here ``alpha`` and ``beta`` are attributes of the node.  onnxruntime-training has no gradient
    for HardSigmoid.
    """
    alpha = node.attributes.get_float("alpha", 0.2)
    return [_clip_line(builder, take_input(node), alpha, node.attributes.get_float("beta", 0.5))]


def rewrite_hard_swish(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite HardSwish as x * clip(x / 6 + 1 / 2, 0, 1).

    onnxruntime-training has no gradient for HardSwish.
    """
    x = take_input(node)
    return [builder.op("Mul", x, _clip_line(builder, x, 1 / 6, 0.5))]


def rewrite_gelu(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite the tanh approximation of GELU as x / 2 * (1 + tanh(a * (x + b * x**3))).

    Here a = sqrt(2 / pi) and b = 0.044715 (arXiv 1606.08415).  Without this rewrite,
    onnxruntime-training would use the gradient of exact GELU for the approximation.  Exact GELU is
    left unchanged.
    """
    if node.attributes.get_string("approximate", "none") != "tanh":
        return None
    x = take_input(node)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    bent = builder.op("Mul", builder.op("Mul", x, x), builder.number(scale * cubic, x.dtype))
    inner = builder.op("Mul", x, builder.op("Add", bent, builder.number(scale, x.dtype)))
    gate = builder.op("Add", builder.op("Tanh", inner), builder.number(1.0, x.dtype))
    return [builder.op("Mul", builder.op("Mul", x, builder.number(0.5, x.dtype)), gate)]


def rewrite_leaky_relu(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite LeakyRelu with a negative ``alpha`` as a Where that selects x or alpha * x.

    The result is x if x >= 0, and alpha * x otherwise.  LeakyReluGrad, the gradient operator of
    onnxruntime-training, derives the sign of x from the sign of y, but if ``alpha`` is negative, y
    is never negative.  Other LeakyRelu nodes are left unchanged.
    """
    alpha = node.attributes.get_float("alpha", 0.01)
    if alpha >= 0:
        return None
    x = take_input(node)
    return [_choose_negative(builder, x, builder.op("Mul", x, builder.number(alpha, x.dtype)))]


def rewrite_prelu(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite PRelu as a Where that selects x if x >= 0, and slope * x otherwise.

    Here ``slope`` is the second input of the node.  onnxruntime-training has no gradient for PRelu.
    """
    x = take_input(node)
    return [_choose_negative(builder, x, builder.op("Mul", x, node.inputs[1]))]


def _choose_negative(builder: NodeBuilder, x: ir.Value, scaled: ir.Value) -> ir.Value:
    below = builder.op("Less", x, builder.number(0.0, x.dtype))
    return builder.op("Where", below, scaled, x)


def rewrite_thresholded_relu(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite ThresholdedRelu as a Where that selects x if x > alpha, and 0 otherwise.

    Here ``alpha`` is an attribute of the node.  onnxruntime-training has no gradient for
    ThresholdedRelu.
    """
    x = take_input(node)
    above = builder.op(
        "Greater", x, builder.number(node.attributes.get_float("alpha", 1.0), x.dtype)
    )
    return [builder.op("Where", above, x, builder.number(0.0, x.dtype))]


def rewrite_shrink(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Shrink with Where nodes that select one of three values.

    The result is x + bias if x < -lambd, x - bias if x > lambd, and 0 otherwise; ``bias`` and
    ``lambd`` are attributes of the node.  onnxruntime-training has no gradient for Shrink.
    """
    x = take_input(node)
    edge = node.attributes.get_float("lambd", 0.5)
    bias = builder.number(node.attributes.get_float("bias", 0.0), x.dtype)
    above = builder.op("Greater", x, builder.number(edge, x.dtype))
    below = builder.op("Less", x, builder.number(-edge, x.dtype))
    upper = builder.op("Where", above, builder.op("Sub", x, bias), builder.number(0.0, x.dtype))
    return [builder.op("Where", below, builder.op("Add", x, bias), upper)]


def rewrite_clip(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite Clip as min(max(x, low), high) if a bound is computed in the graph.

    onnxruntime-training has no gradient for the bounds of Clip.  If both bounds are constants or
    missing, Clip is left unchanged.
    """
    bounds = [*node.inputs[1:], None, None][:2]
    if all(bound is None or known_array(bound) is not None for bound in bounds):
        return None
    result = take_input(node)
    for kind, bound in zip(("Max", "Min"), bounds, strict=True):
        result = result if bound is None else builder.op(kind, result, bound)
    return [result]


def rewrite_softmax(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite float64 Softmax and LogSoftmax nodes with Exp and ReduceSum.

    onnxruntime-training has no float64 kernels for the gradients of these operators.  Nodes of
    other types are left unchanged.  The largest element is subtracted first, so that Exp cannot
    overflow.  It is treated as a constant, because subtracting it does not change the result.
    """
    x = node.inputs[0]
    if x is None or x.dtype != ir.DataType.DOUBLE:
        return None
    axis = builder.integers([node.attributes.get_int("axis", -1)])
    top = builder.op("ReduceMax", builder.detach(x), axis, keepdims=1)
    shifted = builder.op("Sub", x, builder.detach(top))
    powers = builder.op("Exp", shifted)
    total = builder.op("ReduceSum", powers, axis, keepdims=1)
    if node.op_type == "Softmax":
        return [builder.op("Div", powers, total)]
    return [builder.op("Sub", shifted, builder.op("Log", total))]
