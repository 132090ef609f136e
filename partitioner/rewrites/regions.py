"""Regions of images pooled to a fixed size: RoiAlign and MaxRoiPool.

Both read a number of pixels for each bin of each region, gathered as rows of all channels, and
sum or maximise over them; no gradient leads to the regions.  How many pixels a bin has may depend
on its region: each is given as many as the largest needs, and those too many count for nothing.
Formulas: RoiAlign-16 and MaxRoiPool-1 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.extents import (
    Extent,
    multiply,
    read_extents,
    to_number,
    to_vector,
)
from splitonnx.partitioner.rewrites.samplings import to_rows

Values = Sequence[ir.Value]


@dataclass(frozen=True, kw_only=True)
class _Bins:
    """The pixels of each bin along one axis  # (R, P, K); ``used`` is 0 for those too many.

    ``count`` is how many samples a bin has  # (R, 1)
    """

    places: ir.Value
    weights: ir.Value
    used: ir.Value
    count: ir.Value


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One axis of the image, how many bins it has, and the regions' extents along it  # (R, 1)."""

    draft: NodeBuilder
    dtype: ir.DataType
    size: Extent
    bins: int
    start: ir.Value
    extent: ir.Value

    def number(self, value: float) -> ir.Value:
        return self.draft.number(value, self.dtype)

    @property
    def length(self) -> ir.Value:
        return to_number(self.draft, self.size, self.dtype)

    @property
    def step(self) -> ir.Value:
        """How long a bin is."""
        return self.draft.op("Div", self.extent, self.number(self.bins))

    def count_bins(self, start: int = 0) -> ir.Value:
        """Return the bins' numbers  # (1, P)."""
        row = np.arange(start, start + self.bins).reshape(1, -1)
        return self.draft.tensor(ir.tensor(row.astype(self.dtype.numpy())))

    def count_up(self, most: ir.Value) -> ir.Value:
        """Return 0, 1, ... as numbers, as many as the largest count says."""
        draft = self.draft
        end = draft.op("ReduceMax", draft.op("Cast", most, to=ir.DataType.INT64.value), keepdims=0)
        row = draft.op("Range", draft.integer(0), end, draft.integer(1))
        return draft.op("Cast", row, to=self.dtype.value)

    def widen(self, value: ir.Value) -> ir.Value:
        """Append an axis to a value."""
        return self.draft.op("Unsqueeze", value, self.draft.integers([-1]))


def rewrite_roi_align(draft: NodeBuilder, node: ir.Node) -> Values:
    """Average bilinear samples, or take the largest of all their pixels' weighted values."""
    x, rois, images = node.inputs[:3]
    assert x is not None
    assert rois is not None
    assert images is not None
    assert x.dtype is not None
    half = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    aligned = half == "half_pixel"
    offset = draft.number(0.5 if aligned else 0.0, x.dtype)
    scale = draft.number(node.attributes.get_float("spatial_scale", 1.0), x.dtype)
    corners = draft.op("Sub", draft.op("Mul", draft.detach(rois), scale), offset)
    extents = read_extents(draft, node, x)
    bins = []
    for index, name in ((1, "output_height"), (0, "output_width")):
        start, end = (
            draft.op("Gather", corners, draft.integers([i]), axis=1) for i in (index, index + 2)
        )
        extent = draft.op("Sub", end, start)
        if not aligned:
            extent = draft.op("Max", extent, draft.number(1.0, x.dtype))
        axis = _Axis(
            draft=draft,
            dtype=x.dtype,
            size=extents[3 - index],
            bins=node.attributes.get_int(name, 1),
            start=start,
            extent=extent,
        )
        bins.append(_sample_bins(axis, node.attributes.get_int("sampling_ratio", 0)))
    pixels, weights = _gather_bins(draft, x, extents, images, bins)
    weighed = draft.op("Mul", pixels, weights)
    if node.attributes.get_string("mode", "avg") == "max":
        return [_find_largest(draft, weighed, bins, x.dtype)]
    total = draft.op("ReduceSum", weighed, draft.integers([2, 4]), keepdims=0)
    count = draft.op("Mul", *(each.count for each in bins))
    count = draft.op("Max", count, draft.number(1.0, x.dtype))
    count = draft.op("Unsqueeze", count, draft.integers([2, 3]))
    mean = draft.op("Div", total, draft.detach(count))
    return [draft.op("Transpose", mean, perm=[0, 3, 1, 2])]


def _sample_bins(axis: _Axis, ratio: int) -> _Bins:
    """Return the two pixels around each sample of each bin."""
    draft, one, zero = axis.draft, axis.number(1.0), axis.number(0.0)
    ones = draft.op("Add", draft.op("Mul", axis.extent, zero), one)
    count = draft.op("Mul", ones, axis.number(ratio)) if ratio > 0 else draft.op("Ceil", axis.step)
    sample = axis.count_up(count)
    part = draft.op("Div", draft.op("Add", sample, axis.number(0.5)), count)  # (R, G)
    inner = draft.op("Unsqueeze", draft.op("Mul", part, axis.step), draft.integers([1]))
    begin = draft.op("Add", axis.start, draft.op("Mul", axis.count_bins(), axis.step))
    place = draft.op("Add", axis.widen(begin), inner)  # (R, P, G)
    inside = draft.op(
        "And",
        draft.op("GreaterOrEqual", place, axis.number(-1.0)),
        draft.op("LessOrEqual", place, axis.length),
    )
    used = draft.op("Unsqueeze", draft.op("Less", sample, count), draft.integers([1]))
    used = draft.op("Cast", used, to=axis.dtype.value)  # (R, 1, G)
    last = draft.op("Sub", axis.length, one)
    place = draft.op("Min", draft.op("Max", place, zero), last)
    low = draft.op("Floor", place)
    above = draft.op("Sub", place, low)
    high = draft.op("Min", draft.op("Add", low, one), last)
    factor = draft.op("Mul", used, draft.op("Cast", inside, to=axis.dtype.value))
    shares = [draft.op("Mul", factor, s) for s in (draft.op("Sub", one, above), above)]
    both = draft.op("Concat", used, used, axis=2)
    return _Bins(
        places=draft.op("Cast", draft.op("Concat", low, high, axis=2), to=ir.DataType.INT64.value),
        weights=draft.op("Concat", *shares, axis=2),
        used=both,
        count=count,
    )


def rewrite_max_roi_pool(draft: NodeBuilder, node: ir.Node) -> Values:
    """The largest pixel of each bin, 0 where it has none; regions are rounded to whole pixels."""
    x, rois = node.inputs[:2]
    assert x is not None
    assert rois is not None
    assert x.dtype is not None
    rows = draft.detach(rois)
    scale = draft.number(node.attributes.get_float("spatial_scale", 1.0), x.dtype)
    half, one = draft.number(0.5, x.dtype), draft.number(1.0, x.dtype)
    extents = read_extents(draft, node, x)
    shape = node.attributes.get_ints("pooled_shape")
    bins = []
    for index, count in enumerate(shape):
        ends = []
        for column in (2 - index, 4 - index):
            corner = draft.op("Gather", rows, draft.integers([column]), axis=1)
            corner = draft.op("Mul", corner, scale)
            ends.append(draft.op("Floor", draft.op("Add", corner, half)))
        extent = draft.op("Add", draft.op("Sub", ends[1], ends[0]), one)
        axis = _Axis(
            draft=draft,
            dtype=x.dtype,
            size=extents[2 + index],
            bins=count,
            start=ends[0],
            extent=draft.op("Max", extent, one),
        )
        bins.append(_cover_bins(axis))
    images = draft.op("Gather", rows, draft.integer(0), axis=1)
    images = draft.op("Cast", images, to=ir.DataType.INT64.value)
    pixels, _ = _gather_bins(draft, x, extents, images, bins)
    largest = _find_largest(draft, pixels, bins, x.dtype)
    counts = draft.op("Mul", *(
        draft.op("Unsqueeze", each.count, draft.integers([1, 3 - index]))
        for index, each in enumerate(bins)
    ))  # fmt: skip
    filled = draft.detach(draft.op("Greater", counts, draft.number(0.0, x.dtype)))
    return [draft.op("Where", filled, largest, draft.number(0.0, x.dtype))]


def _cover_bins(axis: _Axis) -> _Bins:
    """Return all pixels of each bin."""
    draft, zero = axis.draft, axis.number(0.0)

    def bound(edge: ir.Value) -> ir.Value:
        edge = draft.op("Add", edge, axis.start)
        return draft.op("Min", draft.op("Max", edge, zero), axis.length)

    begin = bound(draft.op("Floor", draft.op("Mul", axis.count_bins(), axis.step)))
    end = bound(draft.op("Ceil", draft.op("Mul", axis.count_bins(1), axis.step)))
    count = draft.op("Max", draft.op("Sub", end, begin), zero)  # (R, P)
    offset = axis.count_up(draft.op("Max", count, axis.number(1.0)))
    place = draft.op("Add", axis.widen(begin), offset)
    last = draft.op("Sub", axis.length, axis.number(1.0))
    used = draft.op("Cast", draft.op("Less", offset, axis.widen(count)), to=axis.dtype.value)
    places = draft.op("Cast", draft.op("Min", place, last), to=ir.DataType.INT64.value)
    return _Bins(places=places, weights=used, used=used, count=count)


def _gather_bins(
    draft: NodeBuilder,
    x: ir.Value,
    extents: Sequence[Extent],
    images: ir.Value,
    bins: Sequence[_Bins],
) -> tuple[ir.Value, ir.Value]:
    """Return the pixels of each bin  # (R, P, K, Q, L, C), and their weights with C = 1."""
    _, _, height, width = extents
    tall, wide = draft.integers([3, 4]), draft.integers([1, 2])
    first = draft.op("Mul", images, to_vector(draft, multiply(draft, [height, width])))
    index = draft.op("Unsqueeze", first, draft.integers([1, 2, 3, 4]))
    line = draft.op("Mul", bins[0].places, to_vector(draft, width))
    index = draft.op("Add", index, draft.op("Unsqueeze", line, tall))
    index = draft.op("Add", index, draft.op("Unsqueeze", bins[1].places, wide))
    pixels = draft.op("Gather", to_rows(draft, x, extents), draft.detach(index), axis=0)
    return pixels, _cross(draft, [each.weights for each in bins])


def _cross(draft: NodeBuilder, values: Sequence[ir.Value]) -> ir.Value:
    """Multiply values of both axes for each pair of pixels  # (R, P, K, Q, L, 1)."""
    tall = draft.op("Unsqueeze", values[0], draft.integers([3, 4, 5]))
    wide = draft.op("Unsqueeze", values[1], draft.integers([1, 2, 5]))
    return draft.detach(draft.op("Mul", tall, wide))


def _find_largest(
    draft: NodeBuilder, values: ir.Value, bins: Sequence[_Bins], dtype: ir.DataType
) -> ir.Value:
    """The largest of each bin's values that count  # (R, C, P, Q)."""
    used = draft.op("Greater", _cross(draft, [each.used for each in bins]), draft.number(0, dtype))
    lowest = draft.number(float(np.finfo(dtype.numpy()).min), dtype)
    values = draft.op("Where", draft.detach(used), values, lowest)
    largest = draft.op("ReduceMax", values, draft.integers([2, 4]), keepdims=0)
    return draft.op("Transpose", largest, perm=[0, 3, 1, 2])
