"""Attach derivatives to trigonometric and hyperbolic functions and their inverses.

The derivatives are the usual ones from textbooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.tangents import Tangent, bound_slope, follow_tangents

Slope = Callable[[NodeBuilder, ir.Value, ir.Value], ir.Value]
"""Computes the derivative at x from detached x and from the value of the function at x."""


def rewrite_function(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value]:
    """Keep an operator and attach its derivative from :data:`SLOPES`.

    The operators are trigonometric and hyperbolic functions and their inverses.
    onnxruntime-training has no gradient for them, so their derivatives are attached explicitly (see
    :mod:`tangents`).
    """
    x = node.inputs[0]
    assert x is not None
    point = builder.detach(x)
    value = builder.op(node.op_type, point)
    slope = SLOPES[node.op_type](builder, point, value)
    return [follow_tangents(builder, value, [Tangent(source=x, point=point, slope=slope)])]


def _one(builder: NodeBuilder, x: ir.Value) -> ir.Value:
    return builder.number(1.0, x.dtype)


def _slope_tan(builder: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Return 1 + tan(x)**2."""
    return builder.op("Add", builder.op("Mul", y, y), _one(builder, x))


def _outside(builder: NodeBuilder, x: ir.Value) -> ir.Value:
    """Return 1 - x**2 as (1 - x) * (1 + x), which is accurate close to 1."""
    one = _one(builder, x)
    return builder.op("Mul", builder.op("Sub", one, x), builder.op("Add", one, x))


def _slope_asin(builder: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Return 1 / sqrt(1 - x**2)."""
    below = builder.op("Sqrt", _outside(builder, x))
    return bound_slope(builder, builder.op("Reciprocal", below), x.dtype)


def _slope_acos(builder: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Return -1 / sqrt(1 - x**2)."""
    return builder.op("Neg", _slope_asin(builder, x, y))


def _slope_atan(builder: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Return 1 / (1 + x**2); if x**2 overflows, the result is 0, as it should be."""
    square = builder.op("Mul", x, x)
    return builder.op("Reciprocal", builder.op("Add", square, _one(builder, x)))


def _slope_sinh(builder: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Return cosh(x)."""
    return bound_slope(builder, builder.op("Cosh", x), x.dtype)


def _slope_cosh(builder: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Return sinh(x)."""
    return bound_slope(builder, builder.op("Sinh", x), x.dtype)


def _slope_asinh(builder: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Return 1 / sqrt(1 + x**2), computed as 1 / cosh(y), in which nothing overflows."""
    return builder.op("Reciprocal", builder.op("Cosh", y))


def _slope_acosh(builder: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Return 1 / sqrt(x**2 - 1), computed as 1 / sinh(y)."""
    return bound_slope(builder, builder.op("Reciprocal", builder.op("Sinh", y)), x.dtype)


def _slope_atanh(builder: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Return 1 / (1 - x**2)."""
    return bound_slope(builder, builder.op("Reciprocal", _outside(builder, x)), x.dtype)


SLOPES: Mapping[str, Slope] = {
    "Acos": _slope_acos,
    "Acosh": _slope_acosh,
    "Asin": _slope_asin,
    "Asinh": _slope_asinh,
    "Atan": _slope_atan,
    "Atanh": _slope_atanh,
    "Cosh": _slope_cosh,
    "Sinh": _slope_sinh,
    "Tan": _slope_tan,
}
