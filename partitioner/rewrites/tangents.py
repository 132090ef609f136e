"""Values with a derivative of their own: for operators that no formula of others expresses well.

``value + slope * (x - detach(x))`` has the value of the operator itself, to the last bit, and the
slope that is written down for it.  It costs three elementwise operators forward and one backward,
and nothing can overflow on a branch that is not taken.  The one thing it cannot take is an
infinite ``x``, for which it gives NaN.  It knows no operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder


@dataclass(frozen=True, kw_only=True)
class Tangent:
    """How a value moves with one of its inputs.

    ``point`` is the detached ``source``, ``slope`` the derivative there, computed from points.
    """

    source: ir.Value
    point: ir.Value
    slope: ir.Value


def follow_tangents(builder: NodeBuilder, value: ir.Value, tangents: Sequence[Tangent]) -> ir.Value:
    """Attach the derivatives in ``tangents`` to ``value``, which is computed from points.

    Shapes broadcast.  Every slope must be finite, or zero times infinity spoils the value:
    :func:`bound_slope`.
    """
    for tangent in tangents:
        step = builder.op("Sub", tangent.source, tangent.point)
        value = builder.op("Add", value, builder.op("Mul", tangent.slope, step))
    return value


def bound_slope(builder: NodeBuilder, slope: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Replace infinity by the largest number of ``dtype``; NaN stays NaN."""
    edge = float((dtype or ir.DataType.FLOAT).max)
    return builder.op("Clip", slope, builder.number(-edge, dtype), builder.number(edge, dtype))
