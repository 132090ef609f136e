"""Interpolation along an axis whose size is known at run time only: the graph finds the weights.

The same formulas as :mod:`interpolations`, in float32 as ONNX Runtime has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.extents import Extent, count_up, to_number
from splitonnx.partitioner.rewrites.interpolations import Kernel

_FLOAT = ir.DataType.FLOAT
COORDINATES = ("align_corners", "asymmetric", "half_pixel", "pytorch_half_pixel")
"""What is written here; the rest needs fixed sizes."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """An axis of ``before`` elements sampled to ``after``; ``scale`` is a F32 value or a number."""

    draft: NodeBuilder
    before: Extent
    after: Extent
    scale: float | ir.Value
    coordinates: str

    def find_coordinates(self) -> ir.Value:
        """Return the position, in the input's coordinates, of each output  # (after,)."""
        draft = self.draft
        y = draft.op("Cast", count_up(draft, self.after), to=_FLOAT.value)
        one, half = draft.number(1.0, _FLOAT), draft.number(0.5, _FLOAT)
        if self.coordinates == "align_corners":
            steps = draft.op("Sub", to_number(draft, self.after, _FLOAT), one)
            last = draft.op("Sub", to_number(draft, self.before, _FLOAT), one)
            return draft.op("Div", draft.op("Mul", y, last), draft.op("Max", steps, one))
        scale = self.scale
        if not isinstance(scale, ir.Value):
            scale = draft.number(scale, _FLOAT)
        if self.coordinates == "asymmetric":
            return draft.op("Div", y, scale)
        x = draft.op("Sub", draft.op("Div", draft.op("Add", y, half), scale), half)
        if self.coordinates == "half_pixel":
            return x
        several = draft.op("Greater", to_number(draft, self.after, _FLOAT), one)
        return draft.op("Where", several, x, draft.number(0.0, _FLOAT))

    def find_nearest(self, mode: str) -> ir.Value:
        """Return the element that each output copies, as I64."""
        draft, x = self.draft, self.find_coordinates()
        half = draft.number(0.5, _FLOAT)
        if mode == "round_prefer_floor":
            x = draft.op("Sub", x, half)
        elif mode == "round_prefer_ceil":
            x = draft.op("Add", x, half)
        up = mode in ("ceil", "round_prefer_floor")
        places = self._clamp(draft.op("Ceil" if up else "Floor", x))
        return draft.op("Cast", places, to=ir.DataType.INT64.value)

    def weigh_neighbours(self, kernel: Kernel) -> ir.Value:
        """Return the matrix of the interpolation, in F32  # (after, before)."""
        return self._weigh_linear() if kernel.mode == "linear" else self._weigh_cubic(kernel)

    def _weigh_linear(self) -> ir.Value:
        draft = self.draft
        x = draft.op("Unsqueeze", self._clamp(self.find_coordinates()), draft.integers([1]))
        places = draft.op("Cast", count_up(draft, self.before), to=_FLOAT.value)
        distances = draft.op("Abs", draft.op("Sub", x, places))
        one, zero = draft.number(1.0, _FLOAT), draft.number(0.0, _FLOAT)
        return draft.op("Max", draft.op("Sub", one, distances), zero)

    def _weigh_cubic(self, kernel: Kernel) -> ir.Value:
        """Weigh four neighbours each, and add up what falls on the same element."""
        draft, a = self.draft, kernel.sharpness
        one = draft.number(1.0, _FLOAT)
        x = draft.op("Unsqueeze", self.find_coordinates(), draft.integers([1]))
        steps = draft.tensor(ir.tensor(np.array([-1, 0, 1, 2], np.float32)))
        places = draft.op("Add", draft.op("Floor", x), steps)  # (after, 4)
        distance = draft.op("Abs", draft.op("Sub", x, places))
        near = self._evaluate(distance, [a + 2, -(a + 3), 0.0, 1.0])
        far = self._evaluate(distance, [a, -5 * a, 8 * a, -4 * a])
        weights = draft.op("Where", draft.op("LessOrEqual", distance, one), near, far)
        inside = self._clamp(places)
        if kernel.exclude_outside:
            kept = draft.op("Cast", draft.op("Equal", places, inside), to=_FLOAT.value)
            weights = draft.op("Mul", weights, kept)
            total = draft.op("ReduceSum", weights, draft.integers([1]), keepdims=1)
            weights = draft.op("Div", weights, total)
        elements = draft.op("Cast", count_up(draft, self.before), to=_FLOAT.value)
        last = draft.integers([2])
        met = draft.op("Equal", draft.op("Unsqueeze", inside, last), elements)
        met = draft.op("Cast", met, to=_FLOAT.value)  # (after, 4, before)
        shares = draft.op("Mul", met, draft.op("Unsqueeze", weights, last))
        return draft.op("ReduceSum", shares, draft.integers([1]), keepdims=0)

    def _evaluate(self, x: ir.Value, factors: Sequence[float]) -> ir.Value:
        """Evaluate a polynomial, the highest power first."""
        draft = self.draft
        value = draft.op("Mul", x, draft.number(factors[0], _FLOAT))
        for factor in factors[1:-1]:
            value = draft.op("Mul", draft.op("Add", value, draft.number(factor, _FLOAT)), x)
        return draft.op("Add", value, draft.number(factors[-1], _FLOAT))

    def _clamp(self, x: ir.Value) -> ir.Value:
        draft = self.draft
        last = draft.op("Sub", to_number(draft, self.before, _FLOAT), draft.number(1.0, _FLOAT))
        return draft.op("Min", draft.op("Max", x, draft.number(0.0, _FLOAT)), last)


def find_after(draft: NodeBuilder, before: Extent, scale: float | ir.Value) -> Extent:
    """Return the size after scaling, rounded down."""
    if not isinstance(scale, ir.Value):
        scale = draft.number(scale, _FLOAT)
    scaled = draft.op("Floor", draft.op("Mul", to_number(draft, before, _FLOAT), scale))
    whole = draft.op("Cast", scaled, to=ir.DataType.INT64.value)
    return draft.op("Reshape", whole, draft.integers([1]))
