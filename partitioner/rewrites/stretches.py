"""Interpolate along an axis if its size is known only at run time.

The weights are computed in the graph with the formulas of :mod:`interpolations`.  They are computed
in float32, as in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.interpolations import Kernel
from splitonnx.partitioner.rewrites.shape_rules import Extent, count_up, to_number

_FLOAT = ir.DataType.FLOAT
COORDINATES = (
    "align_corners", "asymmetric", "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel",
)  # fmt: skip
"""The coordinate modes that are supported for unknown sizes; other modes need fixed sizes."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """The parameters for resizing an axis of unknown size from ``before`` to ``after`` elements.

    ``scale`` is the scale factor, a number or a float32 value of the graph.  ``coordinates`` is the
    node's ``coordinate_transformation_mode``, one of :data:`COORDINATES`.
    """

    builder: NodeBuilder
    before: Extent
    after: Extent
    scale: float | ir.Value
    coordinates: str

    def find_coordinates(self) -> ir.Value:
        """Return the position of each output element in the coordinates of the input.

        The result has the shape (after,).
        """
        builder = self.builder
        y = builder.op("Cast", count_up(builder, self.after), to=_FLOAT.value)
        one, half = builder.number(1.0, _FLOAT), builder.number(0.5, _FLOAT)
        if self.coordinates == "align_corners":
            steps = builder.op("Sub", to_number(builder, self.after, _FLOAT), one)
            last = builder.op("Sub", to_number(builder, self.before, _FLOAT), one)
            return builder.op("Div", builder.op("Mul", y, last), builder.op("Max", steps, one))
        scale = self.scale
        if not isinstance(scale, ir.Value):
            scale = builder.number(scale, _FLOAT)
        if self.coordinates == "asymmetric":
            return builder.op("Div", y, scale)
        x = builder.op("Sub", builder.op("Div", builder.op("Add", y, half), scale), half)
        if self.coordinates == "half_pixel":
            return x
        if self.coordinates == "half_pixel_symmetric":  # the middle is kept if after was rounded
            wide = builder.op("Div", to_number(builder, self.after, _FLOAT), scale)
            rest = builder.op("Sub", to_number(builder, self.before, _FLOAT), wide)
            return builder.op("Add", x, builder.op("Mul", rest, half))
        several = builder.op("Greater", to_number(builder, self.after, _FLOAT), one)
        return builder.op("Where", several, x, builder.number(0.0, _FLOAT))

    def find_nearest(self, mode: str) -> ir.Value:
        """Return the index of the input element that each output element copies.

        The indices are an int64 vector.  ``mode`` is the node's ``nearest_mode``, which defines how
        positions are rounded.
        """
        builder, x = self.builder, self.find_coordinates()
        half = builder.number(0.5, _FLOAT)
        if mode == "round_prefer_floor":
            x = builder.op("Sub", x, half)
        elif mode == "round_prefer_ceil":
            x = builder.op("Add", x, half)
        up = mode in ("ceil", "round_prefer_floor")
        places = self._clamp(builder.op("Ceil" if up else "Floor", x))
        return builder.op("Cast", places, to=ir.DataType.INT64.value)

    def weigh_neighbours(self, kernel: Kernel) -> ir.Value:
        """Return the weights of the interpolation as a float32 matrix of shape (after, before).

        Each row contains the weights of all input elements for one output element.
        """
        return self._weigh_linear() if kernel.mode == "linear" else self._weigh_cubic(kernel)

    def _weigh_linear(self) -> ir.Value:
        builder = self.builder
        x = builder.op("Unsqueeze", self._clamp(self.find_coordinates()), builder.integers([1]))
        places = builder.op("Cast", count_up(builder, self.before), to=_FLOAT.value)
        distances = builder.op("Abs", builder.op("Sub", x, places))
        one, zero = builder.number(1.0, _FLOAT), builder.number(0.0, _FLOAT)
        return builder.op("Max", builder.op("Sub", one, distances), zero)

    def _weigh_cubic(self, kernel: Kernel) -> ir.Value:
        """Weigh four neighbours of each position, and add weights for the same element."""
        builder, a = self.builder, kernel.sharpness
        one = builder.number(1.0, _FLOAT)
        x = builder.op("Unsqueeze", self.find_coordinates(), builder.integers([1]))
        steps = builder.tensor(ir.tensor(np.array([-1, 0, 1, 2], np.float32)))
        places = builder.op("Add", builder.op("Floor", x), steps)  # (after, 4)
        distance = builder.op("Abs", builder.op("Sub", x, places))
        near = self._evaluate(distance, [a + 2, -(a + 3), 0.0, 1.0])
        far = self._evaluate(distance, [a, -5 * a, 8 * a, -4 * a])
        weights = builder.op("Where", builder.op("LessOrEqual", distance, one), near, far)
        inside = self._clamp(places)
        if kernel.exclude_outside:
            kept = builder.op("Cast", builder.op("Equal", places, inside), to=_FLOAT.value)
            weights = builder.op("Mul", weights, kept)
            total = builder.op("ReduceSum", weights, builder.integers([1]), keepdims=1)
            weights = builder.op("Div", weights, total)
        elements = builder.op("Cast", count_up(builder, self.before), to=_FLOAT.value)
        last = builder.integers([2])
        met = builder.op("Equal", builder.op("Unsqueeze", inside, last), elements)
        met = builder.op("Cast", met, to=_FLOAT.value)  # (after, 4, before)
        shares = builder.op("Mul", met, builder.op("Unsqueeze", weights, last))
        return builder.op("ReduceSum", shares, builder.integers([1]), keepdims=0)

    def _evaluate(self, x: ir.Value, factors: Sequence[float]) -> ir.Value:
        """Evaluate a polynomial, the highest power first."""
        builder = self.builder
        value = builder.op("Mul", x, builder.number(factors[0], _FLOAT))
        for factor in factors[1:-1]:
            value = builder.op("Mul", builder.op("Add", value, builder.number(factor, _FLOAT)), x)
        return builder.op("Add", value, builder.number(factors[-1], _FLOAT))

    def _clamp(self, x: ir.Value) -> ir.Value:
        builder = self.builder
        last = builder.op(
            "Sub", to_number(builder, self.before, _FLOAT), builder.number(1.0, _FLOAT)
        )
        return builder.op("Min", builder.op("Max", x, builder.number(0.0, _FLOAT)), last)


def find_after(builder: NodeBuilder, before: Extent, scale: float | ir.Value) -> Extent:
    """Return the size of an axis after scaling: ``before * scale``, rounded down."""
    if not isinstance(scale, ir.Value):
        scale = builder.number(scale, _FLOAT)
    scaled = builder.op("Floor", builder.op("Mul", to_number(builder, before, _FLOAT), scale))
    whole = builder.op("Cast", scaled, to=ir.DataType.INT64.value)
    return builder.op("Reshape", whole, builder.integers([1]))
