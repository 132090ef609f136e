"""Rewrite DepthToSpace and SpaceToDepth, which move data between channels and pixels.

:func:`spread_channels` generalizes DepthToSpace to any number of spatial axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.shape_rules import (
    Extent,
    divide,
    multiply,
    read_extents,
    reshape,
)

Values = Sequence[ir.Value]


def rewrite_depth_to_space(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite DepthToSpace with Reshape and Transpose.

    The channel axis of the input combines the pixels of a block with the output channels.  The
    block comes first in mode DCR, and the channels come first in mode CRD.  onnxruntime-training
    has no gradient for DepthToSpace.
    """
    x = node.inputs[0]
    assert x is not None
    block = node.attributes.get_int("blocksize")
    extents = read_extents(builder, node, x)
    deep = node.attributes.get_string("mode", "DCR") == "DCR"
    return [spread_channels(builder, x, extents, [block, block], block_first=deep)]


def rewrite_space_to_depth(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite SpaceToDepth with Reshape and Transpose.

    The channel axis of the result combines the pixels of a block with the input channels.  The
    block comes first in mode DCR, the default, and the channels come first in mode CRD.
    onnxruntime-training has no gradient for SpaceToDepth.
    """
    x = node.inputs[0]
    assert x is not None
    block = node.attributes.get_int("blocksize")
    batch, channels, height, width = read_extents(builder, node, x)
    rows, columns = divide(builder, height, block), divide(builder, width, block)
    split = reshape(builder, x, [batch, channels, rows, block, columns, block])
    deep = node.attributes.get_string("mode", "DCR") == "DCR"
    turned = builder.op("Transpose", split, perm=[0, 3, 5, 1, 2, 4] if deep else [0, 1, 3, 5, 2, 4])
    return [
        reshape(builder, turned, [batch, multiply(builder, [channels, block**2]), rows, columns])
    ]


def spread_channels(
    builder: NodeBuilder,
    x: ir.Value,
    extents: Sequence[Extent],
    blocks: Sequence[int],
    *,
    block_first: bool = False,
) -> ir.Value:
    """Move blocks from the channel axis of ``x`` to its spatial axes.

    The shape (N, C * b..., L...) becomes (N, C, L * b...), where N is the batch size, C is the
    number of channels, b... are the block sizes, and L... are the spatial sizes.  There may be any
    number of spatial axes.

    ``extents`` is the shape of ``x``.  On its channel axis, C comes before the block; with
    ``block_first``, the block comes before C.
    """
    batch, channels, *spatial = extents
    rank, size = len(spatial), 1
    for block in blocks:
        size *= block
    fewer = divide(builder, channels, size)
    if block_first:
        split = reshape(builder, x, [batch, *blocks, fewer, *spatial])
        order, first = [0, 1 + rank], 1
    else:
        split = reshape(builder, x, [batch, fewer, *blocks, *spatial])
        order, first = [0, 1], 2
    for axis in range(rank):
        order += [2 + rank + axis, first + axis]
    turned = builder.op("Transpose", split, perm=order)
    grown = [multiply(builder, [n, b]) for n, b in zip(spatial, blocks, strict=True)]
    return reshape(builder, turned, [batch, fewer, *grown])
