"""Rewrite RoiAlign and MaxRoiPool, which pool regions of images to a fixed size.

Both operators divide each region into bins, read several pixels for each bin, and compute the
average or the maximum of these pixels.  The pixels are gathered as rows that contain all channels.
The regions get no gradient.  Bins may need different numbers of pixels.  Each bin therefore gathers
as many pixels as the largest bin needs, and surplus pixels are ignored.  The formulas are those of
RoiAlign-16 and MaxRoiPool-1 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.samplings import to_rows
from splitonnx.partitioner.rewrites.shape_rules import (
    Extent,
    multiply,
    read_extents,
    to_number,
    to_vector,
)

Values = Sequence[ir.Value]


@dataclass(frozen=True, kw_only=True)
class _Bins:
    """The pixels of each bin along one axis, as values of shape (R, P, K).

    ``used`` is 0 for surplus pixels.  ``count`` is the number of samples per bin, of shape (R, 1).
    """

    places: ir.Value
    weights: ir.Value
    used: ir.Value
    count: ir.Value


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One axis of the image, its number of bins, and the extents of the regions of shape (R, 1)."""

    builder: NodeBuilder
    dtype: ir.DataType
    size: Extent
    bins: int
    start: ir.Value
    extent: ir.Value

    def number(self, value: float) -> ir.Value:
        return self.builder.number(value, self.dtype)

    @property
    def length(self) -> ir.Value:
        return to_number(self.builder, self.size, self.dtype)

    @property
    def step(self) -> ir.Value:
        """The length of a bin."""
        return self.builder.op("Div", self.extent, self.number(self.bins))

    def count_bins(self, start: int = 0) -> ir.Value:
        """Return the numbers of the bins as a value of shape (1, P)."""
        row = np.arange(start, start + self.bins).reshape(1, -1)
        return self.builder.tensor(ir.tensor(row.astype(self.dtype.numpy())))

    def count_up(self, most: ir.Value) -> ir.Value:
        """Return 0, 1, ... as numbers; the largest element of ``most`` is their count."""
        builder = self.builder
        end = builder.op(
            "ReduceMax", builder.op("Cast", most, to=ir.DataType.INT64.value), keepdims=0
        )
        row = builder.op("Range", builder.integer(0), end, builder.integer(1))
        return builder.op("Cast", row, to=self.dtype.value)

    def widen(self, value: ir.Value) -> ir.Value:
        """Append an axis of length 1 to a value."""
        return self.builder.op("Unsqueeze", value, self.builder.integers([-1]))


def rewrite_roi_align(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite RoiAlign, for which onnxruntime-training has no gradient.

    Each region is divided into bins, and each bin becomes one output element.  In the mode ``avg``,
    the element is the average of the bilinear samples in the bin.  In the mode ``max``, it is the
    largest of the weighted pixels from which these samples are computed.
    """
    x, rois, images = node.inputs[:3]
    assert x is not None
    assert rois is not None
    assert images is not None
    assert x.dtype is not None
    half = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    aligned = half == "half_pixel"
    offset = builder.number(0.5 if aligned else 0.0, x.dtype)
    scale = builder.number(node.attributes.get_float("spatial_scale", 1.0), x.dtype)
    corners = builder.op("Sub", builder.op("Mul", builder.detach(rois), scale), offset)
    extents = read_extents(builder, node, x)
    bins = []
    for index, name in ((1, "output_height"), (0, "output_width")):
        start, end = (
            builder.op("Gather", corners, builder.integers([i]), axis=1) for i in (index, index + 2)
        )
        extent = builder.op("Sub", end, start)
        if not aligned:
            extent = builder.op("Max", extent, builder.number(1.0, x.dtype))
        axis = _Axis(
            builder=builder,
            dtype=x.dtype,
            size=extents[3 - index],
            bins=node.attributes.get_int(name, 1),
            start=start,
            extent=extent,
        )
        bins.append(_sample_bins(axis, node.attributes.get_int("sampling_ratio", 0)))
    pixels, weights = _gather_bins(builder, x, extents, images, bins)
    weighed = builder.op("Mul", pixels, weights)
    if node.attributes.get_string("mode", "avg") == "max":
        return [_find_largest(builder, weighed, bins, x.dtype)]
    total = builder.op("ReduceSum", weighed, builder.integers([2, 4]), keepdims=0)
    count = builder.op("Mul", *(each.count for each in bins))
    count = builder.op("Max", count, builder.number(1.0, x.dtype))
    count = builder.op("Unsqueeze", count, builder.integers([2, 3]))
    mean = builder.op("Div", total, builder.detach(count))
    return [builder.op("Transpose", mean, perm=[0, 3, 1, 2])]


def _sample_bins(axis: _Axis, ratio: int) -> _Bins:
    """Return the two pixels around each sample of each bin."""
    builder, one, zero = axis.builder, axis.number(1.0), axis.number(0.0)
    ones = builder.op("Add", builder.op("Mul", axis.extent, zero), one)
    count = (
        builder.op("Mul", ones, axis.number(ratio)) if ratio > 0 else builder.op("Ceil", axis.step)
    )
    sample = axis.count_up(count)
    part = builder.op("Div", builder.op("Add", sample, axis.number(0.5)), count)  # (R, G)
    inner = builder.op("Unsqueeze", builder.op("Mul", part, axis.step), builder.integers([1]))
    begin = builder.op("Add", axis.start, builder.op("Mul", axis.count_bins(), axis.step))
    place = builder.op("Add", axis.widen(begin), inner)  # (R, P, G)
    inside = builder.op(
        "And",
        builder.op("GreaterOrEqual", place, axis.number(-1.0)),
        builder.op("LessOrEqual", place, axis.length),
    )
    used = builder.op("Unsqueeze", builder.op("Less", sample, count), builder.integers([1]))
    used = builder.op("Cast", used, to=axis.dtype.value)  # (R, 1, G)
    last = builder.op("Sub", axis.length, one)
    place = builder.op("Min", builder.op("Max", place, zero), last)
    low = builder.op("Floor", place)
    above = builder.op("Sub", place, low)
    high = builder.op("Min", builder.op("Add", low, one), last)
    factor = builder.op("Mul", used, builder.op("Cast", inside, to=axis.dtype.value))
    shares = [builder.op("Mul", factor, s) for s in (builder.op("Sub", one, above), above)]
    both = builder.op("Concat", used, used, axis=2)
    return _Bins(
        places=builder.op(
            "Cast", builder.op("Concat", low, high, axis=2), to=ir.DataType.INT64.value
        ),
        weights=builder.op("Concat", *shares, axis=2),
        used=both,
        count=count,
    )


def rewrite_max_roi_pool(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite MaxRoiPool, for which onnxruntime-training has no gradient.

    The corners of the regions are rounded to whole pixels, and each region is divided into bins.
    The result for a bin is its largest pixel, or 0 if the bin is empty.
    """
    x, rois = node.inputs[:2]
    assert x is not None
    assert rois is not None
    assert x.dtype is not None
    rows = builder.detach(rois)
    scale = builder.number(node.attributes.get_float("spatial_scale", 1.0), x.dtype)
    half, one = builder.number(0.5, x.dtype), builder.number(1.0, x.dtype)
    extents = read_extents(builder, node, x)
    shape = node.attributes.get_ints("pooled_shape")
    bins = []
    for index, count in enumerate(shape):
        ends = []
        for column in (2 - index, 4 - index):
            corner = builder.op("Gather", rows, builder.integers([column]), axis=1)
            corner = builder.op("Mul", corner, scale)
            ends.append(builder.op("Floor", builder.op("Add", corner, half)))
        extent = builder.op("Add", builder.op("Sub", ends[1], ends[0]), one)
        axis = _Axis(
            builder=builder,
            dtype=x.dtype,
            size=extents[2 + index],
            bins=count,
            start=ends[0],
            extent=builder.op("Max", extent, one),
        )
        bins.append(_cover_bins(axis))
    images = builder.op("Gather", rows, builder.integer(0), axis=1)
    images = builder.op("Cast", images, to=ir.DataType.INT64.value)
    pixels, _ = _gather_bins(builder, x, extents, images, bins)
    largest = _find_largest(builder, pixels, bins, x.dtype)
    counts = builder.op("Mul", *(
        builder.op("Unsqueeze", each.count, builder.integers([1, 3 - index]))
        for index, each in enumerate(bins)
    ))  # fmt: skip
    filled = builder.detach(builder.op("Greater", counts, builder.number(0.0, x.dtype)))
    return [builder.op("Where", filled, largest, builder.number(0.0, x.dtype))]


def _cover_bins(axis: _Axis) -> _Bins:
    """Return all pixels of each bin."""
    builder, zero = axis.builder, axis.number(0.0)

    def bound(edge: ir.Value) -> ir.Value:
        edge = builder.op("Add", edge, axis.start)
        return builder.op("Min", builder.op("Max", edge, zero), axis.length)

    begin = bound(builder.op("Floor", builder.op("Mul", axis.count_bins(), axis.step)))
    end = bound(builder.op("Ceil", builder.op("Mul", axis.count_bins(1), axis.step)))
    count = builder.op("Max", builder.op("Sub", end, begin), zero)  # (R, P)
    offset = axis.count_up(builder.op("Max", count, axis.number(1.0)))
    place = builder.op("Add", axis.widen(begin), offset)
    last = builder.op("Sub", axis.length, axis.number(1.0))
    used = builder.op("Cast", builder.op("Less", offset, axis.widen(count)), to=axis.dtype.value)
    places = builder.op("Cast", builder.op("Min", place, last), to=ir.DataType.INT64.value)
    return _Bins(places=places, weights=used, used=used, count=count)


def _gather_bins(
    builder: NodeBuilder,
    x: ir.Value,
    extents: Sequence[Extent],
    images: ir.Value,
    bins: Sequence[_Bins],
) -> tuple[ir.Value, ir.Value]:
    """Return the pixels of each bin, (R, P, K, Q, L, C), and their weights, with C = 1."""
    _, _, height, width = extents
    tall, wide = builder.integers([3, 4]), builder.integers([1, 2])
    first = builder.op("Mul", images, to_vector(builder, multiply(builder, [height, width])))
    index = builder.op("Unsqueeze", first, builder.integers([1, 2, 3, 4]))
    line = builder.op("Mul", bins[0].places, to_vector(builder, width))
    index = builder.op("Add", index, builder.op("Unsqueeze", line, tall))
    index = builder.op("Add", index, builder.op("Unsqueeze", bins[1].places, wide))
    pixels = builder.op("Gather", to_rows(builder, x, extents), builder.detach(index), axis=0)
    return pixels, _cross(builder, [each.weights for each in bins])


def _cross(builder: NodeBuilder, values: Sequence[ir.Value]) -> ir.Value:
    """Multiply the values of both axes for each pair of pixels; the shape is (R, P, K, Q, L, 1)."""
    tall = builder.op("Unsqueeze", values[0], builder.integers([3, 4, 5]))
    wide = builder.op("Unsqueeze", values[1], builder.integers([1, 2, 5]))
    return builder.detach(builder.op("Mul", tall, wide))


def _find_largest(
    builder: NodeBuilder, values: ir.Value, bins: Sequence[_Bins], dtype: ir.DataType
) -> ir.Value:
    """Return the largest value of each bin, without surplus pixels, in the shape (R, C, P, Q)."""
    used = builder.op(
        "Greater", _cross(builder, [each.used for each in bins]), builder.number(0, dtype)
    )
    lowest = builder.number(float(np.finfo(dtype.numpy()).min), dtype)
    values = builder.op("Where", builder.detach(used), values, lowest)
    largest = builder.op("ReduceMax", values, builder.integers([2, 4]), keepdims=0)
    return builder.op("Transpose", largest, perm=[0, 3, 1, 2])
