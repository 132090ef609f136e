"""Replace activation functions and their gradients with standard ONNX operators.

In the formulas, ``x`` is the input of the activation function, ``y`` is its output, and ``dy`` is
the gradient of the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, take_input, take_inputs

Values = Sequence[ir.Value | None]

_GELU_TANH = (math.sqrt(2 / math.pi), 0.044715)


def lower_relu_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace ReluGrad with a Where that selects dy if x > 0, and 0 otherwise.

    Here dy is the gradient of the output y.  The second input of the node may be y instead of x,
    because y is positive exactly where x is.
    """
    dy, x = take_inputs(node, 2)
    zero = builder.number(0.0, dy.dtype)
    return [builder.op("Where", builder.op("Greater", x, zero), dy, zero)]


def lower_leaky_relu_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace LeakyReluGrad with a Where that selects dy if y > 0, and alpha * dy otherwise.

    Here dy is the gradient of the output y, and ``alpha`` is an attribute of the node.
    """
    dy, y = take_inputs(node, 2)
    alpha = builder.number(node.attributes.get_float("alpha", 0.01), dy.dtype)
    positive = builder.op("Greater", y, builder.number(0.0, dy.dtype))
    return [builder.op("Where", positive, dy, builder.op("Mul", dy, alpha))]


def lower_sigmoid_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace SigmoidGrad with its formula: dy * y * (1 - y).

    Here dy is the gradient of the output y.
    """
    dy, y = take_inputs(node, 2)
    rest = builder.op("Sub", builder.number(1.0, dy.dtype), y)
    return [builder.op("Mul", builder.op("Mul", dy, y), rest)]


def lower_tanh_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace TanhGrad with its formula: dy * (1 - y**2).

    Here dy is the gradient of the output y.
    """
    dy, y = take_inputs(node, 2)
    square = builder.op("Mul", y, y)
    return [builder.op("Mul", dy, builder.op("Sub", builder.number(1.0, dy.dtype), square))]


def lower_sin_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace SinGrad with its formula: dy * cos(x).

    Here dy is the gradient of the output.
    """
    dy, x = take_inputs(node, 2)
    return [builder.op("Mul", dy, builder.op("Cos", x))]


def lower_softmax_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace SoftmaxGrad with its formula: y * (dy - sum(dy * y)).

    Here dy is the gradient of the output y.  The sum is computed along the axis of the node.
    """
    dy, y = take_inputs(node, 2)
    axes = builder.integers([node.attributes.get_int("axis", -1)])
    total = builder.op("ReduceSum", builder.op("Mul", dy, y), axes, keepdims=1)
    return [builder.op("Mul", y, builder.op("Sub", dy, total))]


def lower_log_softmax_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace LogSoftmaxGrad with its formula: dy - exp(y) * sum(dy).

    Here dy is the gradient of the output y.  The sum is computed along the axis of the node.
    """
    dy, y = take_inputs(node, 2)
    axes = builder.integers([node.attributes.get_int("axis", -1)])
    total = builder.op("ReduceSum", dy, axes, keepdims=1)
    return [builder.op("Sub", dy, builder.op("Mul", builder.op("Exp", y), total))]


def _normal_cdf(builder: NodeBuilder, x: ir.Value, like: ir.Value) -> ir.Value:
    scaled = builder.op("Mul", x, builder.number(math.sqrt(0.5), like.dtype))
    shifted = builder.op("Add", builder.op("Erf", scaled), builder.number(1.0, like.dtype))
    return builder.op("Mul", shifted, builder.number(0.5, like.dtype))


def lower_gelu(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace Gelu with its formula, x * cdf(x) (arXiv 1606.08415).

    Here cdf is the cumulative distribution function of the standard normal distribution, computed
    with Erf.
    """
    x = take_input(node)
    return [builder.op("Mul", x, _normal_cdf(builder, x, x))]


def lower_gelu_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace GeluGrad with its formula: dy * (cdf(x) + x * pdf(x)).

    Here dy is the gradient of the output, and cdf and pdf are the cumulative distribution function
    and the density of the standard normal distribution.
    """
    dy, x = take_inputs(node, 2)
    half = builder.op("Mul", builder.op("Mul", x, x), builder.number(-0.5, x.dtype))
    density = builder.op(
        "Mul", builder.op("Exp", half), builder.number(math.sqrt(0.5 / math.pi), x.dtype)
    )
    slope = builder.op("Add", _normal_cdf(builder, x, x), builder.op("Mul", x, density))
    return [builder.op("Mul", dy, slope)]


def _gelu_tanh(builder: NodeBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return tanh(a * (x + b * x**3)) and x**2."""
    scale, cubic = _GELU_TANH
    square = builder.op("Mul", x, x)
    bent = builder.op("Mul", square, builder.number(cubic * scale, x.dtype))
    inner = builder.op("Mul", x, builder.op("Add", bent, builder.number(scale, x.dtype)))
    return builder.op("Tanh", inner), square


def _add_bias(builder: NodeBuilder, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    if bias is None:
        return x
    total = builder.op("Add", x, bias)
    total.type = x.type
    return total


def lower_fast_gelu(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace FastGelu, a tanh approximation of GELU, with its formula.

    The formula is x / 2 * (1 + tanh(a * (x + b * x**3))), where a = sqrt(2 / pi) and b = 0.044715.
    If the node has a bias, the bias is added to x first.
    """
    x = _add_bias(builder, take_input(node), node.inputs[1] if len(node.inputs) > 1 else None)
    tanh, _ = _gelu_tanh(builder, x)
    half = builder.op("Mul", x, builder.number(0.5, x.dtype))
    return [builder.op("Mul", half, builder.op("Add", tanh, builder.number(1.0, x.dtype)))]


def lower_fast_gelu_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace FastGeluGrad, the gradient of FastGelu, with its formula.

    The formula is:

    dy * ((1 + t) / 2 + x / 2 * (1 - t**2) * a * (1 + 3 * b * x**2)).

    Here dy is the gradient of the output, t is tanh(a * (x + b * x**3)), and a and b are the
    constants of :func:`lower_fast_gelu`.
    """
    dy, x = take_inputs(node, 2)
    scale, cubic = _GELU_TANH
    tanh, square = _gelu_tanh(builder, x)
    one, half = builder.number(1.0, x.dtype), builder.number(0.5, x.dtype)
    steep = builder.op("Sub", one, builder.op("Mul", tanh, tanh))
    inner = builder.op("Mul", square, builder.number(3 * cubic * scale, x.dtype))
    inner = builder.op("Add", inner, builder.number(scale, x.dtype))
    second = builder.op("Mul", builder.op("Mul", x, steep), inner)
    both = builder.op("Add", builder.op("Add", one, tanh), second)
    return [builder.op("Mul", dy, builder.op("Mul", both, half))]


def _swish_gate(builder: NodeBuilder, node: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    alpha = builder.number(node.attributes.get_float("alpha", 1.702), x.dtype)
    return builder.op("Sigmoid", builder.op("Mul", x, alpha)), alpha


def lower_quick_gelu(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace QuickGelu with its formula: x * sigmoid(alpha * x).

    Here ``alpha`` is an attribute of the node.
    """
    x = take_input(node)
    return [builder.op("Mul", x, _swish_gate(builder, node, x)[0])]


def lower_quick_gelu_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace QuickGeluGrad with its formula: dy * (s + alpha * x * s * (1 - s)).

    Here dy is the gradient of the output, s is sigmoid(alpha * x), and ``alpha`` is an attribute of
    the node.
    """
    dy, x = take_inputs(node, 2)
    gate, alpha = _swish_gate(builder, node, x)
    rest = builder.op("Sub", builder.number(1.0, x.dtype), gate)
    bent = builder.op("Mul", builder.op("Mul", builder.op("Mul", x, alpha), gate), rest)
    return [builder.op("Mul", dy, builder.op("Add", gate, bent))]
