"""Attach explicit derivatives to the results of operators that have no gradient.

The expression ``value + slope * (x - detach(x))`` has the same value as ``value`` alone and the
derivative ``slope``, because no gradient passes through ``detach(x)``.  This is used for operators
that cannot be written well with other operators.  It costs three elementwise operators in the
forward pass and one in the backward pass, and nothing can overflow in a branch that is not used.
The only limitation is that the result is NaN if ``x`` is infinite.  This module does not depend on
any operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder


@dataclass(frozen=True, kw_only=True)
class Tangent:
    """The derivative of a value with respect to one of its inputs, ``source``.

    ``point`` is a detached copy of ``source``.  ``slope`` is the derivative, computed from detached
    values.
    """

    source: ir.Value
    point: ir.Value
    slope: ir.Value


def follow_tangents(builder: NodeBuilder, value: ir.Value, tangents: Sequence[Tangent]) -> ir.Value:
    """Attach the derivatives in ``tangents`` to ``value``, which is computed from detached inputs.

    The shapes of the tangents must be broadcastable to the shape of ``value``.  Every slope must be
    finite, because zero times infinity would make the value NaN; see :func:`bound_slope`.
    """
    for tangent in tangents:
        step = builder.op("Sub", tangent.source, tangent.point)
        value = builder.op("Add", value, builder.op("Mul", tangent.slope, step))
    return value


def bound_slope(builder: NodeBuilder, slope: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Replace infinite slopes with the largest number of ``dtype``; NaN stays NaN."""
    edge = float((dtype or ir.DataType.FLOAT).max)
    return builder.op("Clip", slope, builder.number(-edge, dtype), builder.number(edge, dtype))
