"""Build running sums and products along an axis from operators that have gradients.

Each step shifts the tensor with a Pad node, and adds or multiplies the shifted and the unshifted
tensor.  The distance of the shift doubles with each step, so ``n`` elements take about ``log2(n)``
steps.  There are no divisions, so zeros are harmless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder


@dataclass(frozen=True, kw_only=True)
class Line:
    """The axis of a tensor along which to accumulate, and the direction.

    ``rank`` is the tensor's number of dimensions, and ``length`` the number of elements along the
    axis.  ``reverse`` means that the accumulation begins at the end of the axis.
    """

    axis: int
    rank: int
    length: int
    reverse: bool = False


def accumulate(
    builder: NodeBuilder, kind: Literal["Add", "Mul"], x: ir.Value, line: Line, *, exclusive: bool
) -> ir.Value:
    """Build the running sum (``kind`` "Add") or product ("Mul") of ``x`` along an axis.

    ``line`` contains the axis and the direction.  ``exclusive`` means that each result includes
    only the elements before its position in this direction, not the element at its position.
    """
    dtype = x.dtype
    neutral = builder.number(0.0 if kind == "Add" else 1.0, dtype)
    if exclusive and line.length < 2:  # Pad leaves memory uninitialized if nothing is left
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
