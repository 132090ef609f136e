"""Rewrite Resize one axis at a time.

Each axis is resized by copying its elements or by a product with a matrix of weights.  The formulas
are those of Resize-19 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, known_dims
from splitonnx.partitioner.graphs.tables import limit
from splitonnx.partitioner.rewrites.interpolations import (
    Kernel,
    Sampling,
    find_nearest,
    find_outside,
    weigh_neighbours,
)
from splitonnx.partitioner.rewrites.shape_rules import (
    Extent,
    multiply,
    read_extents,
    refuse,
    require_rank,
    reshape,
    to_number,
)
from splitonnx.partitioner.rewrites.stretches import COORDINATES, Stretch, find_after

Values = Sequence[ir.Value]

_SIZELESS = ("asymmetric", "half_pixel", "pytorch_half_pixel")
"""Coordinate modes in which the coordinates depend only on the scale, not on the image size."""


def rewrite_resize(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Resize with Gather, Expand or MatMul for each axis that is resized.

    If the size of an axis is unknown, the indices or weights for it are computed in the graph.
    onnxruntime-training has no CPU kernel for the gradient of Resize.
    """
    x = node.inputs[0]
    assert x is not None
    mode = node.attributes.get_string("mode", "nearest")
    made, left = x, dict(_read_factors(node, x))
    extents = read_extents(builder, node, x)
    if mode == "nearest":
        repeats = {axis: int(s) for axis, s in left.items() if s and _repeats(node, s)}
        if any(times > 1 for times in repeats.values()):
            made, extents = _repeat_elements(builder, x, extents, repeats)
        left = {axis: s for axis, s in left.items() if axis not in repeats}
    samplings = _read_samplings(node, x, left)
    for axis, sampling in samplings.items():
        if sampling.identical:
            continue
        if mode == "nearest":
            nearest = node.attributes.get_string("nearest_mode", "round_prefer_floor")
            places = find_nearest(sampling, nearest)
            made = builder.op("Gather", made, builder.integers(places.tolist()), axis=axis)
        else:
            matrix = weigh_neighbours(sampling, _read_kernel(node))
            assert x.dtype is not None
            weights = builder.tensor(ir.tensor(matrix.astype(x.dtype.numpy())))
            made = _multiply_axis(builder, made, extents, axis, weights, sampling.after)
        extents[axis] = sampling.after
    made = _extrapolate(builder, node, x, made, samplings)
    for axis, scale in left.items():
        if axis not in samplings and (axis > 1 or scale not in (None, 1.0)):
            made = _stretch_axis(builder, node, made, extents, axis, scale)
    return [made]


def _stretch_axis(
    builder: NodeBuilder,
    node: ir.Node,
    made: ir.Value,
    extents: list[Extent],
    axis: int,
    scale: float | None,
) -> ir.Value:
    """Resample an axis whose size before or after is not known, and update ``extents``."""
    x, mode = node.inputs[0], node.attributes.get_string("mode", "nearest")
    assert x is not None
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if changes := list(_list_changes(node, coordinates)):
        raise refuse(
            node,
            f"the size of '{x.name}' along axis {axis}, before or after, is not known",
            f"fix it with --dim NAME=SIZE, or export it {' and '.join(changes)}",
        )
    before, place = extents[axis], builder.integers([_read_axes(node, x).index(axis)])
    factor: float | ir.Value | None = scale
    if factor is None and (given := _get_scales(node)) is not None:
        factor = builder.op("Gather", given, place, axis=0)
    if factor is None:
        sizes = known_array(node.inputs[3])
        after: Extent = builder.op("Gather", node.inputs[3], place, axis=0)
        if sizes is not None:
            after = int(sizes[_read_axes(node, x).index(axis)])
        ratio = (to_number(builder, size, ir.DataType.FLOAT) for size in (after, before))
        factor = builder.op("Div", *ratio)
    else:
        after = find_after(builder, before, factor)
    stretch = Stretch(
        builder=builder, before=before, after=after, scale=factor, coordinates=coordinates
    )
    if mode == "nearest":
        nearest = node.attributes.get_string("nearest_mode", "round_prefer_floor")
        made = builder.op("Gather", made, builder.detach(stretch.find_nearest(nearest)), axis=axis)
    else:
        weights = builder.detach(
            builder.cast(stretch.weigh_neighbours(_read_kernel(node)), x.dtype)
        )
        made = _multiply_axis(builder, made, extents, axis, weights, after)
    extents[axis] = after
    return made


def _list_changes(node: ir.Node, coordinates: str) -> Iterator[str]:
    """Yield what must be changed in a node so that it can resize an axis of unknown size."""
    if node.attributes.get_int("antialias", 0):
        yield "without antialias"
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        yield "with the keep_aspect_ratio_policy 'stretch'"
    if coordinates not in COORDINATES:
        yield f"without the coordinate_transformation_mode '{coordinates}'"


def _read_axes(node: ir.Node, x: ir.Value) -> list[int]:
    rank = require_rank(node, x)
    return [axis % rank for axis in node.attributes.get_ints("axes", range(rank))]


def _get_scales(node: ir.Node) -> ir.Value | None:
    """Return the scales if they are computed in the graph, else ``None``."""
    given = node.inputs[2] if len(node.inputs) > 2 else None
    return given if given is not None and known_array(given) is None else None


def _read_factors(node: ir.Node, x: ir.Value) -> Mapping[int, float | None]:
    """Return the factor of each axis; ``None`` if it is computed, or if sizes are given."""
    axes = _read_axes(node, x)
    scales = known_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is not None and scales.size:
        return {axis: float(scale) for axis, scale in zip(axes, scales, strict=True)}
    return dict.fromkeys(axes)


def _repeats(node: ir.Node, scale: float) -> bool:
    """Return whether resizing repeats each element of an axis, whatever the axis's size."""
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if scale == 1.0:
        return coordinates != "tf_crop_and_resize"
    if not scale.is_integer() or coordinates not in _SIZELESS:
        return False
    times, some = int(scale), 4
    sampling = Sampling(before=some, after=some * times, scale=scale, coordinates=coordinates)
    nearest = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    expected = np.repeat(np.arange(some), times)
    return bool(np.array_equal(find_nearest(sampling, nearest), expected))


def _repeat_elements(
    builder: NodeBuilder, x: ir.Value, extents: Sequence[Extent], repeats: Mapping[int, int]
) -> tuple[ir.Value, list[Extent]]:
    """Repeat elements: (N, C, H, W), (N, C, H, 1, W, 1), (N, C, H, h, W, w), (N, C, Hh, Ww)."""
    axes = sorted(axis for axis, times in repeats.items() if times > 1)
    places = [axis + 1 + count for count, axis in enumerate(axes)]
    spread = builder.op("Unsqueeze", x, builder.integers(places))
    shape = [1] * (len(extents) + len(axes))
    for axis, place in zip(axes, places, strict=True):
        shape[place] = repeats[axis]
    spread = builder.op("Expand", spread, builder.integers(shape))
    grown = [multiply(builder, [n, repeats.get(axis, 1)]) for axis, n in enumerate(extents)]
    return reshape(builder, spread, grown), grown


def _read_samplings(
    node: ir.Node, x: ir.Value, factors: Mapping[int, float | None]
) -> dict[int, Sampling]:
    """Find out how each axis of ``factors`` is sampled; leave out axes of unknown size.

    Raises:
        UnsupportedModel: runtimes disagree about the result, or the region is not a constant.
    """
    sizes = _read_sizes(node, x, factors)
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    regions = _read_regions(node, x, coordinates)
    samplings = {}
    for axis, (before, after, scale) in sizes.items():
        start, end = regions.get(axis, (0.0, 1.0))
        if coordinates == "align_corners" and abs(scale * before - after) > 1e-3 and after > 1:
            raise refuse(
                node,
                f"with align_corners a scale of {scale:g} makes {before} elements a fraction, "
                "which ONNX Runtime and the standard's reference place differently",
                "export it with sizes instead of scales",
            )
        samplings[axis] = Sampling(
            before=before, after=after, scale=scale, coordinates=coordinates, start=start, end=end
        )
    return samplings


def _read_sizes(
    node: ir.Node, x: ir.Value, factors: Mapping[int, float | None]
) -> dict[int, tuple[int, int, float]]:
    """Map each axis to its size before and after and its scale; leave out axes of unknown size."""
    if _get_scales(node) is not None:
        return {}
    before, after = known_dims(x) or [], known_dims(node.outputs[0]) or []
    axes = _read_axes(node, x)
    wanted = known_array(node.inputs[3]) if len(node.inputs) > 3 else None
    found: dict[int, tuple[int, int, float]] = {}
    for axis, scale in factors.items():
        n = before[axis]
        m = after[axis] if len(after) > axis else None
        if wanted is not None:
            m = int(wanted[axes.index(axis)])
        if m is None and n is not None and scale is not None:
            m = int(np.float32(scale) * np.float32(n))
        if n is not None and m is not None:
            copies = node.attributes.get_string("mode", "nearest") == "nearest"
            limit(node, m if copies else m * n)
            found[axis] = (n, m, m / n if scale is None else scale)
    policy = node.attributes.get_string("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch" or wanted is None:
        return found
    pick = min if policy == "not_larger" else max
    shared = pick(scale for _, _, scale in found.values())
    return {axis: (n, int(shared * n + 0.5), shared) for axis, (n, _, _) in found.items()}


def _read_regions(
    node: ir.Node, x: ir.Value, coordinates: str
) -> Mapping[int, tuple[float, float]]:
    if coordinates != "tf_crop_and_resize":
        return {}
    region = known_array(node.inputs[1])
    axes = _read_axes(node, x)
    if region is None or region.size != 2 * len(axes):
        raise refuse(node, "its region is computed in the graph", "export it with a fixed region")
    ends = zip(region[: len(axes)].tolist(), region[len(axes) :].tolist(), strict=True)
    return dict(zip(axes, ends, strict=True))


def _read_kernel(node: ir.Node) -> Kernel:
    return Kernel(
        mode=node.attributes.get_string("mode", "nearest"),
        sharpness=node.attributes.get_float("cubic_coeff_a", -0.75),
        antialias=bool(node.attributes.get_int("antialias", 0)),
        exclude_outside=bool(node.attributes.get_int("exclude_outside", 0)),
    )


def _multiply_axis(
    builder: NodeBuilder,
    x: ir.Value,
    extents: Sequence[Extent],
    axis: int,
    matrix: ir.Value,
    after: Extent,
) -> ir.Value:
    """Multiply one axis by a matrix (after, before); the axes after it are treated as columns."""
    if axis == len(extents) - 1:
        return builder.op("MatMul", x, builder.op("Transpose", matrix, perm=[1, 0]))
    if axis == len(extents) - 2:
        return builder.op("MatMul", matrix, x)
    front, behind = extents[:axis], extents[axis + 1 :]
    columns = reshape(builder, x, [*front, extents[axis], multiply(builder, behind)])
    return reshape(builder, builder.op("MatMul", matrix, columns), [*front, after, *behind])


def _extrapolate(
    builder: NodeBuilder,
    node: ir.Node,
    x: ir.Value,
    made: ir.Value,
    samplings: Mapping[int, Sampling],
) -> ir.Value:
    """Write the extrapolation value to outputs whose region is outside the input."""
    outside = {axis: find_outside(sampling) for axis, sampling in samplings.items()}
    if not any(places.any() for places in outside.values()):
        return made
    assert x.dtype is not None
    rank = require_rank(node, x)
    inside = np.ones([1] * rank)
    for axis, places in outside.items():
        shape = [1] * rank
        shape[axis] = len(places)
        inside = inside * ~places.reshape(shape)
    dtype = x.dtype.numpy()
    value = node.attributes.get_float("extrapolation_value", 0.0)
    if node.attributes.get_string("mode", "nearest") == "nearest":
        made = builder.op("Mul", made, builder.tensor(ir.tensor(inside.astype(dtype))))
    return builder.op("Add", made, builder.tensor(ir.tensor(((1 - inside) * value).astype(dtype))))
