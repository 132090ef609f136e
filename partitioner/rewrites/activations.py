"""Activation functions, by operators that are exact for large inputs and have a gradient at 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, take_input
from splitonnx.partitioner.rewrites.tangents import Tangent, follow_tangents

Values = Sequence[ir.Value]

_SELU = (1.67326319217681884765625, 1.05070102214813232421875)
"""alpha and gamma, as Selu's definition writes them."""


def _bend(
    draft: NodeBuilder, node: ir.Node, above: float, below: float, width: float = 1.0
) -> Sequence[ir.Value]:
    """The operator itself, its slope ``above`` for x > 0, else ``below * exp(x / width)``."""
    x = take_input(node)
    point = draft.detach(x)
    value = draft.ops(node.op_type, [point], 1, dict(node.attributes))[0]
    zero = draft.number(0.0, x.dtype)
    negative = draft.op("Min", point, zero)
    if width != 1.0:
        negative = draft.op("Div", negative, draft.number(width, x.dtype))
    curve = draft.op("Exp", negative)
    if below != 1.0:
        curve = draft.op("Mul", curve, draft.number(below, x.dtype))
    slope = draft.op("Where", draft.op("Greater", point, zero), draft.number(above, x.dtype), curve)
    return [follow_tangents(draft, value, [Tangent(source=x, point=point, slope=slope)])]


def rewrite_celu(draft: NodeBuilder, node: ir.Node) -> Values:
    """max(0, x) + min(0, alpha * (exp(x / alpha) - 1))."""
    return _bend(draft, node, 1.0, 1.0, node.attributes.get_float("alpha", 1.0))


def rewrite_elu(draft: NodeBuilder, node: ir.Node) -> Values:
    """x for x > 0, else alpha * (exp(x) - 1)."""
    return _bend(draft, node, 1.0, node.attributes.get_float("alpha", 1.0))


def rewrite_selu(draft: NodeBuilder, node: ir.Node) -> Values:
    """gamma * (x for x > 0, else alpha * (exp(x) - 1))."""
    alpha = node.attributes.get_float("alpha", _SELU[0])
    gamma = node.attributes.get_float("gamma", _SELU[1])
    return _bend(draft, node, gamma, gamma * alpha)


def rewrite_softplus(draft: NodeBuilder, node: ir.Node) -> Values:
    """log(1 + exp(x)) as m + log(exp(-m) + exp(x - m)), m = max(x, 0).

    One of the two powers is 1, neither can overflow, and the slope at 0 is 1/2 whichever slope
    Relu has there.  The operator's own kernel with a tangent takes 1.7 times as long.
    """
    x = take_input(node)
    positive = draft.op("Relu", x)
    powers = [
        draft.op("Exp", draft.op("Neg", positive)),
        draft.op("Exp", draft.op("Sub", x, positive)),
    ]
    return [draft.op("Add", positive, draft.op("Log", draft.op("Add", *powers)))]


def rewrite_mish(draft: NodeBuilder, node: ir.Node) -> Values:
    """x * tanh(softplus(x))."""
    x = take_input(node)
    return [draft.op("Mul", x, draft.op("Tanh", draft.op("Softplus", x)))]


def rewrite_softsign(draft: NodeBuilder, node: ir.Node) -> Values:
    """x / (1 + |x|)."""
    x = take_input(node)
    spread = draft.op("Add", draft.op("Abs", x), draft.number(1.0, x.dtype))
    return [draft.op("Div", x, spread)]


def _clip_line(draft: NodeBuilder, x: ir.Value, alpha: float, beta: float) -> ir.Value:
    line = draft.op("Mul", x, draft.number(alpha, x.dtype))
    line = draft.op("Add", line, draft.number(beta, x.dtype))
    return draft.op("Clip", line, draft.number(0.0, x.dtype), draft.number(1.0, x.dtype))


def rewrite_hard_sigmoid(draft: NodeBuilder, node: ir.Node) -> Values:
    """alpha * x + beta, between 0 and 1."""
    alpha = node.attributes.get_float("alpha", 0.2)
    return [_clip_line(draft, take_input(node), alpha, node.attributes.get_float("beta", 0.5))]


def rewrite_hard_swish(draft: NodeBuilder, node: ir.Node) -> Values:
    """x * (x / 6 + 1 / 2, between 0 and 1)."""
    x = take_input(node)
    return [draft.op("Mul", x, _clip_line(draft, x, 1 / 6, 0.5))]


def rewrite_gelu(draft: NodeBuilder, node: ir.Node) -> Values | None:
    """x / 2 * (1 + tanh(a * (x + b * x**3))) (arXiv 1606.08415).

    The exact one stays; for this one the builder would write the exact one's gradient.
    """
    if node.attributes.get_string("approximate", "none") != "tanh":
        return None
    x = take_input(node)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    bent = draft.op("Mul", draft.op("Mul", x, x), draft.number(scale * cubic, x.dtype))
    inner = draft.op("Mul", x, draft.op("Add", bent, draft.number(scale, x.dtype)))
    gate = draft.op("Add", draft.op("Tanh", inner), draft.number(1.0, x.dtype))
    return [draft.op("Mul", draft.op("Mul", x, draft.number(0.5, x.dtype)), gate)]


def rewrite_leaky_relu(draft: NodeBuilder, node: ir.Node) -> Values | None:
    """x for x >= 0, else alpha * x; LeakyReluGrad tells x's sign from y's, so alpha must be > 0."""
    alpha = node.attributes.get_float("alpha", 0.01)
    if alpha >= 0:
        return None
    x = take_input(node)
    return [_choose_negative(draft, x, draft.op("Mul", x, draft.number(alpha, x.dtype)))]


def rewrite_prelu(draft: NodeBuilder, node: ir.Node) -> Values:
    """x for x >= 0, else slope * x."""
    x = take_input(node)
    return [_choose_negative(draft, x, draft.op("Mul", x, node.inputs[1]))]


def _choose_negative(draft: NodeBuilder, x: ir.Value, scaled: ir.Value) -> ir.Value:
    below = draft.op("Less", x, draft.number(0.0, x.dtype))
    return draft.op("Where", below, scaled, x)


def rewrite_thresholded_relu(draft: NodeBuilder, node: ir.Node) -> Values:
    """x for x > alpha, else 0."""
    x = take_input(node)
    above = draft.op("Greater", x, draft.number(node.attributes.get_float("alpha", 1.0), x.dtype))
    return [draft.op("Where", above, x, draft.number(0.0, x.dtype))]


def rewrite_shrink(draft: NodeBuilder, node: ir.Node) -> Values:
    """x + bias for x < -lambd, x - bias for x > lambd, else 0."""
    x = take_input(node)
    edge = node.attributes.get_float("lambd", 0.5)
    bias = draft.number(node.attributes.get_float("bias", 0.0), x.dtype)
    above = draft.op("Greater", x, draft.number(edge, x.dtype))
    below = draft.op("Less", x, draft.number(-edge, x.dtype))
    upper = draft.op("Where", above, draft.op("Sub", x, bias), draft.number(0.0, x.dtype))
    return [draft.op("Where", below, draft.op("Add", x, bias), upper)]


def rewrite_clip(draft: NodeBuilder, node: ir.Node) -> Values | None:
    """min(max(x, low), high) whose bounds vary: the builder has no gradient for them."""
    bounds = [*node.inputs[1:], None, None][:2]
    if all(bound is None or known_array(bound) is not None for bound in bounds):
        return None
    result = take_input(node)
    for kind, bound in zip(("Max", "Min"), bounds, strict=True):
        result = result if bound is None else draft.op(kind, result, bound)
    return [result]


def rewrite_softmax(draft: NodeBuilder, node: ir.Node) -> Values | None:
    """Softmax or LogSoftmax in float64, for whose gradient onnxruntime-training has no kernel.

    The largest element is taken off as a constant: the result does not depend on it.
    """
    x = node.inputs[0]
    if x is None or x.dtype != ir.DataType.DOUBLE:
        return None
    axis = draft.integers([node.attributes.get_int("axis", -1)])
    top = draft.op("ReduceMax", draft.detach(x), axis, keepdims=1)
    shifted = draft.op("Sub", x, draft.detach(top))
    powers = draft.op("Exp", shifted)
    total = draft.op("ReduceSum", powers, axis, keepdims=1)
    if node.op_type == "Softmax":
        return [draft.op("Div", powers, total)]
    return [draft.op("Sub", shifted, draft.op("Log", total))]
