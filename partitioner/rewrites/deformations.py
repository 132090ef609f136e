"""DeformConv: a convolution whose windows take their pixels from places that the graph computes.

The pixels are sampled as GridSample does it, beyond the image as zeros, and multiplied with the
weights as one matrix.  Formula: DeformConv-19 at onnx.ai/onnx/operators (arXiv 1811.11168).
ONNX Runtime 1.19.2 has no kernel of the operator itself, so it trains there but does not predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.extents import (
    Extent,
    count_up,
    multiply,
    read_extents,
    refuse,
    require_sizes,
    reshape,
)
from splitonnx.partitioner.rewrites.samplings import ImageAxis, to_rows, weigh_taps

Values = Sequence[ir.Value]


def rewrite_deform_conv(draft: NodeBuilder, node: ir.Node) -> Values:
    """Sample the windows' pixels, times their mask, and multiply them with the weights."""
    x, w, offset, bias, mask = [*node.inputs, None, None][:5]
    assert x is not None
    assert w is not None
    assert offset is not None
    outputs, inputs, *kernel = require_sizes(node, w)
    if len(kernel) != 2:
        raise refuse(node, f"it has {len(kernel)} spatial dimensions, not 2", "leave it out")
    groups = node.attributes.get_int("group", 1)
    parts, count = node.attributes.get_int("offset_group", 1), math.prod(kernel)
    batch, _, *image = read_extents(draft, node, x)
    wanted = read_extents(draft, node, offset)[2:]
    channels, windows = inputs * groups, multiply(draft, wanted)
    images = multiply(draft, [batch, parts])
    taps = []
    moved = reshape(draft, offset, [images, count, 2, windows])
    for index, base in enumerate(_place_windows(draft, node, x, wanted, kernel)):
        shift = draft.op("Gather", moved, draft.integer(index), axis=2)
        place = draft.op("Reshape", draft.op("Add", shift, base), draft.integers([0, -1]))
        axis = ImageAxis(
            draft=draft,
            size=image[index],
            dtype=x.dtype or ir.DataType.FLOAT,
            padding="zeros",
            corners=True,
        )
        taps.append(axis.list_taps(place, "linear"))
    pieces: list[Extent] = [images, channels // parts, *image]
    rows = to_rows(draft, reshape(draft, x, pieces), pieces)
    pixels = weigh_taps(draft, rows, images, image, taps)  # (N * parts, k * L, C / parts)
    if mask is not None:
        factor = reshape(draft, mask, [images, multiply(draft, [count, windows]), 1])
        pixels = draft.op("Mul", pixels, factor)
    columns = reshape(draft, pixels, [batch, parts, count, windows, channels // parts])
    columns = draft.op("Transpose", columns, perm=[0, 1, 4, 2, 3])
    columns = reshape(draft, columns, [batch, groups, inputs * count, windows])
    matrix = draft.op("Reshape", w, draft.integers([groups, outputs // groups, inputs * count]))
    made = reshape(draft, draft.op("MatMul", matrix, columns), [batch, outputs, *wanted])
    if bias is not None:
        made = draft.op("Add", made, draft.op("Reshape", bias, draft.integers([-1, 1, 1])))
    return [made]


def _place_windows(
    draft: NodeBuilder, node: ir.Node, x: ir.Value, wanted: Sequence[Extent], kernel: Sequence[int]
) -> list[ir.Value]:
    """Return each window's positions along each axis, without offset  # (1, k, L)."""
    dtype = x.dtype or ir.DataType.FLOAT
    strides = node.attributes.get_ints("strides", [1, 1])
    dilations = node.attributes.get_ints("dilations", [1, 1])
    pads = node.attributes.get_ints("pads", [0, 0, 0, 0])
    elements = np.meshgrid(*(np.arange(k) for k in kernel), indexing="ij")
    lines = []
    for axis in range(2):
        line = draft.op("Mul", count_up(draft, wanted[axis]), draft.integers([strides[axis]]))
        line = draft.op("Sub", line, draft.integers([pads[axis]]))
        lines.append(draft.op("Unsqueeze", line, draft.integers([1 - axis])))
    found = []
    for axis, line in enumerate(lines):
        other = draft.op("Mul", lines[1 - axis], draft.integers([0]))
        flat = draft.op("Reshape", draft.op("Add", line, other), draft.integers([1, 1, -1]))
        within = (elements[axis] * dilations[axis]).reshape(1, -1, 1).astype(np.int64)
        place = draft.op("Add", flat, draft.tensor(ir.tensor(within)))
        found.append(draft.op("Cast", place, to=dtype.value))
    return found
