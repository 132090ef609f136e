"""Trigonometric and hyperbolic functions and their inverses, each with its textbook derivative."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.tangents import Tangent, bound_slope, follow_tangents

Slope = Callable[[NodeBuilder, ir.Value, ir.Value], ir.Value]
"""From x (detached) and the function's value there to its derivative there."""


def rewrite_function(draft: NodeBuilder, node: ir.Node) -> Sequence[ir.Value]:
    """The operator itself, with its derivative from :data:`SLOPES`."""
    x = node.inputs[0]
    assert x is not None
    point = draft.detach(x)
    value = draft.op(node.op_type, point)
    slope = SLOPES[node.op_type](draft, point, value)
    return [follow_tangents(draft, value, [Tangent(source=x, point=point, slope=slope)])]


def _one(draft: NodeBuilder, x: ir.Value) -> ir.Value:
    return draft.number(1.0, x.dtype)


def _slope_tan(draft: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """1 + tan(x)**2."""
    return draft.op("Add", draft.op("Mul", y, y), _one(draft, x))


def _outside(draft: NodeBuilder, x: ir.Value) -> ir.Value:
    """1 - x**2 as (1 - x) * (1 + x), which loses nothing close to 1."""
    one = _one(draft, x)
    return draft.op("Mul", draft.op("Sub", one, x), draft.op("Add", one, x))


def _slope_asin(draft: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """1 / sqrt(1 - x**2)."""
    below = draft.op("Sqrt", _outside(draft, x))
    return bound_slope(draft, draft.op("Reciprocal", below), x.dtype)


def _slope_acos(draft: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """-1 / sqrt(1 - x**2)."""
    return draft.op("Neg", _slope_asin(draft, x, y))


def _slope_atan(draft: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """1 / (1 + x**2); where x**2 overflows that is the 0 it should be."""
    square = draft.op("Mul", x, x)
    return draft.op("Reciprocal", draft.op("Add", square, _one(draft, x)))


def _slope_sinh(draft: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """cosh(x)."""
    return bound_slope(draft, draft.op("Cosh", x), x.dtype)


def _slope_cosh(draft: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """sinh(x)."""
    return bound_slope(draft, draft.op("Sinh", x), x.dtype)


def _slope_asinh(draft: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """1 / sqrt(1 + x**2), which is 1 / cosh(y); nothing overflows in that."""
    return draft.op("Reciprocal", draft.op("Cosh", y))


def _slope_acosh(draft: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """1 / sqrt(x**2 - 1), which is 1 / sinh(y)."""
    return bound_slope(draft, draft.op("Reciprocal", draft.op("Sinh", y)), x.dtype)


def _slope_atanh(draft: NodeBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """1 / (1 - x**2)."""
    return bound_slope(draft, draft.op("Reciprocal", _outside(draft, x)), x.dtype)


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
