"""Rewrite GridSample and AffineGrid, which sample images at positions computed in the graph.

A sample is the weighted sum of the pixels around its position.  The pixels are gathered as rows
that contain all channels.  The weights are polynomials in the position, and therefore both the
image and the positions get a gradient.  The choice of the pixels to read and the number of
reflections at the borders are treated as constants.  The formulas are those of GridSample-20 and
AffineGrid-20 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, known_dims
from splitonnx.partitioner.graphs.tables import limit
from splitonnx.partitioner.rewrites.shape_rules import (
    Extent,
    advise_fixing,
    count_up,
    multiply,
    read_extents,
    refuse,
    reshape,
    to_number,
    to_vector,
)

Values = Sequence[ir.Value]


@dataclass(frozen=True, kw_only=True)
class Taps:
    """The pixels around each position along one axis.

    ``places`` contains the int64 indices of the pixels, and ``weights`` contains their weights.
    Both have the shape (N, P, K), where N is the number of images, P is the number of positions per
    image, and K is the number of pixels per position.
    """

    places: ir.Value
    weights: ir.Value


@dataclass(frozen=True, kw_only=True)
class ImageAxis:
    """One axis of an image.

    ``size`` is the number of pixels along the axis, and ``dtype`` is the type of the pixels.
    ``padding`` is the node's ``padding_mode``, which defines the values outside the image.  If
    ``corners`` is true, the borders of the image are at the centres of the outermost pixels instead
    of at their outer edges.
    """

    builder: NodeBuilder
    size: Extent
    dtype: ir.DataType
    padding: str
    corners: bool

    def number(self, value: float) -> ir.Value:
        """Return a constant of the image's dtype with the given value."""
        return self.builder.number(value, self.dtype)

    @property
    def length(self) -> ir.Value:
        """The number of pixels along this axis, as a value of the image's dtype."""
        return to_number(self.builder, self.size, self.dtype)

    @property
    def last(self) -> ir.Value:
        """The coordinate of the last pixel's centre."""
        return self.builder.op("Sub", self.length, self.number(1.0))

    @property
    def low(self) -> ir.Value:
        """The coordinate of the border at the start of the axis."""
        return self.number(0.0 if self.corners else -0.5)

    @property
    def high(self) -> ir.Value:
        """The coordinate of the border at the end of the axis."""
        return self.last if self.corners else self.builder.op("Sub", self.length, self.number(0.5))

    def clamp(self, x: ir.Value) -> ir.Value:
        """Limit coordinates to the range from the first to the last pixel's centre."""
        builder = self.builder
        return builder.op("Min", builder.op("Max", x, self.number(0.0)), self.last)

    def fold(self, x: ir.Value) -> ir.Value:
        """Reflect coordinates at the borders of the image until they are inside it."""
        builder = self.builder
        if self.corners and self.size == 1:
            return self.clamp(x)
        span = builder.op("Sub", self.high, self.low)
        point = builder.detach(x)
        times = builder.op("Floor", builder.op("Div", builder.op("Sub", point, self.low), span))
        back = builder.op("Mod", times, self.number(2.0), fmod=1)
        back = builder.op("Abs", back)  # 1 on every second stretch
        sign = builder.op("Sub", self.number(1.0), builder.op("Mul", back, self.number(2.0)))
        turn = builder.op("Mul", back, builder.op("Add", self.low, self.high))
        shift = builder.op("Sub", turn, builder.op("Mul", sign, builder.op("Mul", times, span)))
        return builder.op("Add", builder.op("Mul", builder.detach(sign), x), builder.detach(shift))

    def bring_inside(self, x: ir.Value) -> ir.Value:
        """Clamp or reflect coordinates outside the image, as the padding mode requires.

        In the mode ``"zeros"``, the coordinates are left unchanged.
        """
        builder = self.builder
        if self.padding == "reflection":
            return self.fold(x)
        if self.padding == "border":
            point = builder.detach(x)
            outside = builder.op(
                "Or", builder.op("Less", point, self.low), builder.op("Greater", point, self.high)
            )
            return builder.op("Where", outside, builder.detach(self.clamp(point)), x)
        return x

    def list_taps(self, x: ir.Value, mode: str) -> Taps:
        """Find the pixels around each position along this axis, and their weights.

        ``x`` contains the positions and has the shape (N, P), where N is the number of images and P
        is the number of positions per image.  ``mode`` is the interpolation mode of the node.
        """
        builder = self.builder
        if mode == "nearest":
            base, offsets, weights = (
                x,
                [0],
                builder.op("Add", builder.op("Mul", x, self.number(0.0)), self.number(1.0)),
            )
            weights = builder.op("Unsqueeze", weights, builder.integers([2]))
        else:
            base = builder.detach(builder.op("Floor", builder.detach(x)))
            part = builder.op("Unsqueeze", builder.op("Sub", x, base), builder.integers([2]))
            cubic = mode in ("cubic", "bicubic")
            offsets = [-1, 0, 1, 2] if cubic else [0, 1]
            weights = self._weigh_cubic(part) if cubic else self._weigh_linear(part)
        steps = builder.tensor(ir.tensor(np.array(offsets, self.dtype.numpy())))
        places = builder.op("Add", builder.op("Unsqueeze", base, builder.integers([2])), steps)
        inside = places
        if self.padding == "reflection":
            places = builder.op("Round", self.fold(places))
        elif self.padding == "zeros":
            inside = builder.op(
                "And",
                builder.op("GreaterOrEqual", places, self.number(0.0)),
                builder.op("LessOrEqual", places, self.last),
            )
            inside = builder.detach(builder.op("Cast", inside, to=self.dtype.value))
            weights = builder.op("Mul", weights, inside)
        places = builder.op("Cast", self.clamp(places), to=ir.DataType.INT64.value)
        return Taps(places=places, weights=weights)

    def _weigh_linear(self, part: ir.Value) -> ir.Value:
        builder = self.builder
        return builder.op("Concat", builder.op("Sub", self.number(1.0), part), part, axis=2)

    def _weigh_cubic(self, part: ir.Value) -> ir.Value:
        """Return Keys' weights with a = -0.75; ``part`` (N, P, 1) is the position's fraction."""
        a = -0.75
        builder = self.builder
        polynomials = np.array(
            [[0, a, -2 * a, a], [1, 0, -(a + 3), a + 2],
             [0, -a, 2 * a + 3, -(a + 2)], [0, 0, a, -a]],
            self.dtype.numpy(),
        )  # fmt: skip
        square = builder.op("Mul", part, part)
        ones = builder.op("Add", builder.op("Mul", part, self.number(0.0)), self.number(1.0))
        powers = builder.op("Concat", ones, part, square, builder.op("Mul", square, part), axis=2)
        return builder.op("MatMul", powers, builder.tensor(ir.tensor(polynomials.T.copy())))


def rewrite_grid_sample(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite GridSample as the weighted sum of the pixels around each position of the grid.

    The last axis of the grid contains the coordinates of a position in the order x, y (and z for
    volumes), the reverse of the order of the image's axes.  onnxruntime-training has no gradient
    for GridSample.
    """
    x, grid = node.inputs[:2]
    assert x is not None
    assert grid is not None
    assert x.dtype is not None
    mode = node.attributes.get_string("mode", "linear")
    if mode == "nearest":
        grid = builder.detach(grid)
    batch, channels, *image = read_extents(builder, node, x)
    wanted = read_extents(builder, node, grid)[1:-1]
    rank = _count_axes(node, image)
    points = builder.op("Reshape", grid, builder.integers([0, -1, rank]))
    axes = [
        ImageAxis(
            builder=builder,
            size=size,
            dtype=x.dtype,
            padding=node.attributes.get_string("padding_mode", "zeros"),
            corners=bool(node.attributes.get_int("align_corners", 0)),
        )
        for size in image
    ]
    taps = []
    for index, axis in enumerate(axes):
        place = builder.op("Gather", points, builder.integer(rank - 1 - index), axis=2)
        place = _denormalize(place, axis)
        if mode == "nearest":
            place = builder.op("Round", place)
        if mode not in ("cubic", "bicubic"):  # in cubic modes, padding moves pixels, not positions
            place = axis.bring_inside(place)
        taps.append(axis.list_taps(place, mode))
    rows = to_rows(builder, x, [batch, channels, *image])
    sampled = weigh_taps(builder, rows, batch, image, taps)
    turned = builder.op("Transpose", sampled, perm=[0, 2, 1])
    return [reshape(builder, turned, [batch, channels, *wanted])]


def _denormalize(place: ir.Value, axis: ImageAxis) -> ir.Value:
    """Map the range from -1 to 1 to the coordinates of the axis."""
    builder, one, half = axis.builder, axis.number(1.0), axis.number(0.5)
    raised = builder.op("Add", place, one)
    if axis.corners:
        return builder.op("Mul", raised, builder.op("Mul", axis.last, half))
    whole = builder.op("Mul", raised, axis.length)
    return builder.op("Mul", builder.op("Sub", whole, one), half)


def to_rows(builder: NodeBuilder, x: ir.Value, extents: Sequence[Extent]) -> ir.Value:
    """Convert images to one row of channels per pixel.

    ``extents`` is the shape of the images, (N, C, L...), where N is the number of images, C is the
    number of channels, and L... are the sizes of an image.  The result has the shape (N *
    prod(L...), C).
    """
    rank = len(extents)
    turned = builder.op("Transpose", x, perm=[0, *range(2, rank), 1])
    if isinstance(extents[1], int):
        return builder.op("Reshape", turned, builder.integers([-1, extents[1]]))
    return reshape(builder, turned, [multiply(builder, [extents[0], *extents[2:]]), extents[1]])


def weigh_taps(
    builder: NodeBuilder,
    rows: ir.Value,
    batch: Extent,
    image: Sequence[Extent],
    taps: Sequence[Taps],
) -> ir.Value:
    """Return the weighted sum of the pixels around each position.

    ``rows`` contains the pixels of ``batch`` images, from :func:`to_rows`.  ``image`` contains the
    sizes of an image.  ``taps`` contains, for each axis, the pixels to read and their weights.  The
    weight of a pixel is the product of its weights along all axes.  The result has the shape (N, P,
    C) for N images, P positions per image, and C channels.
    """
    rank = len(taps)
    size = to_vector(builder, multiply(builder, image))
    first = builder.op("Mul", count_up(builder, batch), size)
    index = builder.op("Unsqueeze", first, builder.integers(range(1, 2 + rank)))
    factors = []
    for axis, tap in enumerate(taps):
        others = builder.integers([2 + other for other in range(rank) if other != axis])
        stride = to_vector(builder, multiply(builder, image[axis + 1 :]))
        step = builder.op("Mul", builder.op("Unsqueeze", tap.places, others), stride)
        index = builder.op("Add", index, step)
        factors.append(builder.op("Unsqueeze", tap.weights, others))
    weights = reduce(lambda left, right: builder.op("Mul", left, right), factors)
    weights = builder.op("Unsqueeze", weights, builder.integers([2 + rank]))
    pixels = builder.op("Gather", rows, builder.detach(index), axis=0)
    weighed = builder.op("Mul", pixels, weights)
    return builder.op("ReduceSum", weighed, builder.integers(range(2, 2 + rank)), keepdims=0)


def _count_axes(node: ir.Node, image: Sequence[object]) -> int:
    if not image:
        raise refuse(node, "its image has no axis beside batch and channels", "give it one")
    return len(image)


def rewrite_affine_grid(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite AffineGrid as the product of the base grid and each affine matrix.

    The base grid is a constant that contains the homogeneous coordinates of all pixels.
    onnxruntime-training has no gradient for AffineGrid.
    """
    theta = node.inputs[0]
    assert theta is not None
    assert theta.dtype is not None
    image = _read_image(node)
    if image is None:
        advice = f"{advise_fixing(node, 1)}export it with fixed sizes"
        raise refuse(node, "its sizes are computed in the graph", advice)
    rank, corners = _count_axes(node, image), node.attributes.get_int("align_corners", 0)
    limit(node, math.prod(image) * (rank + 1))
    lines = []
    for n in image:
        edge = 1.0 if corners else 1.0 - 1.0 / n
        lines.append(np.linspace(-edge, edge, n) if n > 1 or not corners else np.array([-1.0]))
    places = np.meshgrid(*lines, indexing="ij")
    base = np.stack([*places[::-1], np.ones(image)], axis=-1).reshape(1, -1, rank + 1)
    turned = builder.op("Transpose", theta, perm=[0, 2, 1])
    grid = builder.op("MatMul", builder.tensor(ir.tensor(base.astype(theta.dtype.numpy()))), turned)
    batch = read_extents(builder, node, theta)[0]
    return [reshape(builder, grid, [batch, *image, rank])]


def _read_image(node: ir.Node) -> list[int] | None:
    """Read the sizes of an AffineGrid's image; ``None`` if they are not constant.

    The number of images may be computed: it is that of the matrices.
    """
    sizes = known_array(node.inputs[1])
    if sizes is not None:
        return [int(size) for size in sizes[2:]]
    joined = node.inputs[1].producer() if node.inputs[1] is not None else None
    shaped = joined.inputs[0] if joined is not None and joined.op_type == "Shape" else None
    if joined is not None and shaped is not None and not joined.attributes:
        dims = known_dims(shaped) or []
        image = [size for size in dims[2:] if size is not None]
        return image if image and len(image) == len(dims) - 2 else None
    if joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2:
        return None
    first, rest = joined.inputs[0], known_array(joined.inputs[1])
    if first is None or first.shape is None or first.shape.dims != (1,) or rest is None:
        return None
    return [int(size) for size in rest[1:]]
