"""Rewrite DeformConv, a convolution that reads pixels at positions computed in the graph.

The pixels are sampled as in GridSample, with zeros outside the image, and then multiplied by the
weights in a single matrix product.  The formula is that of DeformConv-19 at onnx.ai/onnx/operators
(arXiv 1811.11168).  ONNX Runtime 1.19.2 has no kernel for DeformConv: it can train the rewritten
model, but it cannot run the original model for prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.samplings import ImageAxis, to_rows, weigh_taps
from splitonnx.partitioner.rewrites.shape_rules import (
    Extent,
    count_up,
    multiply,
    read_extents,
    refuse,
    require_sizes,
    reshape,
)

Values = Sequence[ir.Value]


def rewrite_deform_conv(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite DeformConv by sampling the pixels of all windows and multiplying them by the weights.

    If the node has a mask, it is applied to the sampled pixels first.  onnxruntime-training has no
    gradient for DeformConv.
    """
    x, w, offset, bias, mask = [*node.inputs, None, None][:5]
    assert x is not None
    assert w is not None
    assert offset is not None
    outputs, inputs, *kernel = require_sizes(node, w)
    if len(kernel) != 2:
        raise refuse(node, f"it has {len(kernel)} spatial dimensions, not 2", "leave it out")
    groups = node.attributes.get_int("group", 1)
    parts, count = node.attributes.get_int("offset_group", 1), math.prod(kernel)
    batch, _, *image = read_extents(builder, node, x)
    wanted = read_extents(builder, node, offset)[2:]
    channels, windows = inputs * groups, multiply(builder, wanted)
    images = multiply(builder, [batch, parts])
    taps = []
    moved = reshape(builder, offset, [images, count, 2, windows])
    for index, base in enumerate(_place_windows(builder, node, x, wanted, kernel)):
        shift = builder.op("Gather", moved, builder.integer(index), axis=2)
        place = builder.op("Reshape", builder.op("Add", shift, base), builder.integers([0, -1]))
        axis = ImageAxis(
            builder=builder,
            size=image[index],
            dtype=x.dtype or ir.DataType.FLOAT,
            padding="zeros",
            corners=True,
        )
        taps.append(axis.list_taps(place, "linear"))
    pieces: list[Extent] = [images, channels // parts, *image]
    rows = to_rows(builder, reshape(builder, x, pieces), pieces)
    pixels = weigh_taps(builder, rows, images, image, taps)  # (N * parts, k * L, C / parts)
    if mask is not None:
        factor = reshape(builder, mask, [images, multiply(builder, [count, windows]), 1])
        pixels = builder.op("Mul", pixels, factor)
    columns = reshape(builder, pixels, [batch, parts, count, windows, channels // parts])
    columns = builder.op("Transpose", columns, perm=[0, 1, 4, 2, 3])
    columns = reshape(builder, columns, [batch, groups, inputs * count, windows])
    matrix = builder.op("Reshape", w, builder.integers([groups, outputs // groups, inputs * count]))
    made = reshape(builder, builder.op("MatMul", matrix, columns), [batch, outputs, *wanted])
    if bias is not None:
        made = builder.op("Add", made, builder.op("Reshape", bias, builder.integers([-1, 1, 1])))
    return [made]


def _place_windows(
    builder: NodeBuilder,
    node: ir.Node,
    x: ir.Value,
    wanted: Sequence[Extent],
    kernel: Sequence[int],
) -> list[ir.Value]:
    """Return the positions of each window along each axis, without offset: shape (1, k, L)."""
    dtype = x.dtype or ir.DataType.FLOAT
    strides = node.attributes.get_ints("strides", [1, 1])
    dilations = node.attributes.get_ints("dilations", [1, 1])
    pads = node.attributes.get_ints("pads", [0, 0, 0, 0])
    elements = np.meshgrid(*(np.arange(k) for k in kernel), indexing="ij")
    lines = []
    for axis in range(2):
        line = builder.op("Mul", count_up(builder, wanted[axis]), builder.integers([strides[axis]]))
        line = builder.op("Sub", line, builder.integers([pads[axis]]))
        lines.append(builder.op("Unsqueeze", line, builder.integers([1 - axis])))
    found = []
    for axis, line in enumerate(lines):
        other = builder.op("Mul", lines[1 - axis], builder.integers([0]))
        flat = builder.op("Reshape", builder.op("Add", line, other), builder.integers([1, 1, -1]))
        within = (elements[axis] * dilations[axis]).reshape(1, -1, 1).astype(np.int64)
        place = builder.op("Add", flat, builder.tensor(ir.tensor(within)))
        found.append(builder.op("Cast", place, to=dtype.value))
    return found
