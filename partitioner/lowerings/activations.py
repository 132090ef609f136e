"""Gradients of activations.  ``dy`` is the gradient of the output, ``x`` input, ``y`` output."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, take_input, take_inputs

Values = Sequence[ir.Value | None]

_GELU_TANH = (math.sqrt(2 / math.pi), 0.044715)


def lower_relu_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """dy where x > 0; y > 0 says the same."""
    dy, x = take_inputs(node, 2)
    zero = draft.number(0.0, dy.dtype)
    return [draft.op("Where", draft.op("Greater", x, zero), dy, zero)]


def lower_leaky_relu_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """dy where y > 0, else alpha * dy."""
    dy, y = take_inputs(node, 2)
    alpha = draft.number(node.attributes.get_float("alpha", 0.01), dy.dtype)
    positive = draft.op("Greater", y, draft.number(0.0, dy.dtype))
    return [draft.op("Where", positive, dy, draft.op("Mul", dy, alpha))]


def lower_sigmoid_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """dy * y * (1 - y)."""
    dy, y = take_inputs(node, 2)
    rest = draft.op("Sub", draft.number(1.0, dy.dtype), y)
    return [draft.op("Mul", draft.op("Mul", dy, y), rest)]


def lower_tanh_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """dy * (1 - y**2)."""
    dy, y = take_inputs(node, 2)
    square = draft.op("Mul", y, y)
    return [draft.op("Mul", dy, draft.op("Sub", draft.number(1.0, dy.dtype), square))]


def lower_sin_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """dy * cos(x)."""
    dy, x = take_inputs(node, 2)
    return [draft.op("Mul", dy, draft.op("Cos", x))]


def lower_softmax_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """y * (dy - sum(dy * y))."""
    dy, y = take_inputs(node, 2)
    axes = draft.integers([node.attributes.get_int("axis", -1)])
    total = draft.op("ReduceSum", draft.op("Mul", dy, y), axes, keepdims=1)
    return [draft.op("Mul", y, draft.op("Sub", dy, total))]


def lower_log_softmax_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """dy - exp(y) * sum(dy)."""
    dy, y = take_inputs(node, 2)
    axes = draft.integers([node.attributes.get_int("axis", -1)])
    total = draft.op("ReduceSum", dy, axes, keepdims=1)
    return [draft.op("Sub", dy, draft.op("Mul", draft.op("Exp", y), total))]


def _normal_cdf(draft: NodeBuilder, x: ir.Value, like: ir.Value) -> ir.Value:
    scaled = draft.op("Mul", x, draft.number(math.sqrt(0.5), like.dtype))
    shifted = draft.op("Add", draft.op("Erf", scaled), draft.number(1.0, like.dtype))
    return draft.op("Mul", shifted, draft.number(0.5, like.dtype))


def lower_gelu(draft: NodeBuilder, node: ir.Node) -> Values:
    """x * cdf(x) of the standard normal distribution (arXiv 1606.08415)."""
    x = take_input(node)
    return [draft.op("Mul", x, _normal_cdf(draft, x, x))]


def lower_gelu_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """dy * (cdf(x) + x * pdf(x))."""
    dy, x = take_inputs(node, 2)
    half = draft.op("Mul", draft.op("Mul", x, x), draft.number(-0.5, x.dtype))
    density = draft.op(
        "Mul", draft.op("Exp", half), draft.number(math.sqrt(0.5 / math.pi), x.dtype)
    )
    slope = draft.op("Add", _normal_cdf(draft, x, x), draft.op("Mul", x, density))
    return [draft.op("Mul", dy, slope)]


def _gelu_tanh(draft: NodeBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """tanh(a * (x + b * x**3)) and x**2."""
    scale, cubic = _GELU_TANH
    square = draft.op("Mul", x, x)
    bent = draft.op("Mul", square, draft.number(cubic * scale, x.dtype))
    inner = draft.op("Mul", x, draft.op("Add", bent, draft.number(scale, x.dtype)))
    return draft.op("Tanh", inner), square


def _add_bias(draft: NodeBuilder, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    if bias is None:
        return x
    total = draft.op("Add", x, bias)
    total.type = x.type
    return total


def lower_fast_gelu(draft: NodeBuilder, node: ir.Node) -> Values:
    """x / 2 * (1 + tanh(a * (x + b * x**3))), x with its bias where there is one."""
    x = _add_bias(draft, take_input(node), node.inputs[1] if len(node.inputs) > 1 else None)
    tanh, _ = _gelu_tanh(draft, x)
    half = draft.op("Mul", x, draft.number(0.5, x.dtype))
    return [draft.op("Mul", half, draft.op("Add", tanh, draft.number(1.0, x.dtype)))]


def lower_fast_gelu_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """dy * ((1 + t) / 2 + x / 2 * (1 - t**2) * a * (1 + 3 * b * x**2)), t the tanh."""
    dy, x = take_inputs(node, 2)
    scale, cubic = _GELU_TANH
    tanh, square = _gelu_tanh(draft, x)
    one, half = draft.number(1.0, x.dtype), draft.number(0.5, x.dtype)
    steep = draft.op("Sub", one, draft.op("Mul", tanh, tanh))
    inner = draft.op("Mul", square, draft.number(3 * cubic * scale, x.dtype))
    inner = draft.op("Add", inner, draft.number(scale, x.dtype))
    second = draft.op("Mul", draft.op("Mul", x, steep), inner)
    both = draft.op("Add", draft.op("Add", one, tanh), second)
    return [draft.op("Mul", dy, draft.op("Mul", both, half))]


def _swish_gate(draft: NodeBuilder, node: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    alpha = draft.number(node.attributes.get_float("alpha", 1.702), x.dtype)
    return draft.op("Sigmoid", draft.op("Mul", x, alpha)), alpha


def lower_quick_gelu(draft: NodeBuilder, node: ir.Node) -> Values:
    """x * sigmoid(alpha * x)."""
    x = take_input(node)
    return [draft.op("Mul", x, _swish_gate(draft, node, x)[0])]


def lower_quick_gelu_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """dy * (s + alpha * x * s * (1 - s)), s the sigmoid."""
    dy, x = take_inputs(node, 2)
    gate, alpha = _swish_gate(draft, node, x)
    rest = draft.op("Sub", draft.number(1.0, x.dtype), gate)
    bent = draft.op("Mul", draft.op("Mul", draft.op("Mul", x, alpha), gate), rest)
    return [draft.op("Mul", dy, draft.op("Add", gate, bent))]
