"""Attach explicit derivatives to the results of operators that have no gradient.

The expression ``value + slope * (x - detach(x))`` equals ``value``, but its derivative is
``slope``, because no gradient passes through ``detach(x)``.  Rewrites use this expression for
operators that cannot be expressed well with other operators.  The forward pass costs three
elementwise operators and the backward pass one, and there are no unused branches that could
overflow.  The only limitation is that the result is NaN if ``x`` is infinite.  This module does not
depend on any particular operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder


@dataclass(frozen=True, kw_only=True)
class Tangent:
    """The derivative of a value with respect to ``source``, one of the inputs of its operator.

    ``point`` is a copy of ``source`` through which no gradient passes.  ``slope`` is the derivative
    at this point; no gradient passes through it either.
    """

    source: ir.Value
    point: ir.Value
    slope: ir.Value


def follow_tangents(builder: NodeBuilder, value: ir.Value, tangents: Sequence[Tangent]) -> ir.Value:
    """Return a tensor that equals ``value`` and has the derivatives in ``tangents``.

    ``value`` has no gradient, because it is computed from detached inputs.  For each tangent, the
    term ``slope * (source - point)`` is added to ``value``.  The term is zero, because ``point`` is
    a copy of ``source``, but its derivative with respect to ``source`` is ``slope``, because no
    gradient passes through ``point``.

    The terms must be broadcastable to the shape of ``value``.  Every slope must be finite, because
    zero times infinity would make the result NaN; see :func:`bound_slope`.
    """
    for tangent in tangents:
        step = builder.op("Sub", tangent.source, tangent.point)
        value = builder.op("Add", value, builder.op("Mul", tangent.slope, step))
    return value


def bound_slope(builder: NodeBuilder, slope: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Replace infinite slopes (derivatives) with the largest finite number of ``dtype``.

    The sign of a slope is kept, and NaN stays NaN.
    """
    edge = float((dtype or ir.DataType.FLOAT).max)
    return builder.op("Clip", slope, builder.number(-edge, dtype), builder.number(edge, dtype))
