"""Compute running sums and products along an axis, with shifts whose distance doubles.

For ``n`` elements this takes ``log2(n)`` steps of a Pad and an Add or Mul, each of which has a
gradient.  Nothing is divided, so zeros cause no errors.  This module does not depend on
which operator the sums and products replace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder


@dataclass(frozen=True, kw_only=True)
class Line:
    """An axis of a tensor: the tensor's ``rank``, the axis's ``length``, and the direction."""

    axis: int
    rank: int
    length: int
    reverse: bool = False


def accumulate(
    builder: NodeBuilder, kind: Literal["Add", "Mul"], x: ir.Value, line: Line, *, exclusive: bool
) -> ir.Value:
    """Compute the running sum or product; it includes each element itself unless ``exclusive``."""
    dtype = x.dtype
    neutral = builder.number(0.0 if kind == "Add" else 1.0, dtype)
    if exclusive and line.length < 2:  # nothing is left to shift, which ONNX Runtime's Pad spoils
        return builder.op("Expand", neutral, builder.shape(x))
    if exclusive:
        x = _shift(builder, x, line, 1, neutral)
    distance = 1
    while distance < line.length:
        x = builder.op(kind, x, _shift(builder, x, line, distance, neutral))
        distance *= 2
    return x


def _shift(
    builder: NodeBuilder, x: ir.Value, line: Line, distance: int, fill: ir.Value
) -> ir.Value:
    pads = [0] * (2 * line.rank)
    forward = -distance if line.reverse else distance
    pads[line.axis], pads[line.axis + line.rank] = forward, -forward
    return builder.op("Pad", x, builder.integers(pads), fill)
