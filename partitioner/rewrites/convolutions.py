"""Rewrite ConvTranspose, Col2Im and some Conv nodes so that they can be differentiated.

A Conv is rewritten if its padding depends on an unknown image size.

The windows of a ConvTranspose with stride s are s pixels apart.  Along each axis, the pixels of its
output therefore fall into s phases, and each phase is an ordinary convolution with every s-th
element of the kernel.  One Conv computes all phases of all axes at once, in separate output
channels, which are then rearranged into the image.  This requires as many multiplications as the
ConvTranspose itself, and no zeros are inserted into the image.  The formulas are those of
ConvTranspose-11 and Col2Im-18 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.tables import limit
from splitonnx.partitioner.rewrites.layouts import spread_channels
from splitonnx.partitioner.rewrites.shape_rules import (
    Extent,
    add,
    multiply,
    read_extents,
    refuse,
    require_array,
    require_sizes,
    reshape,
)
from splitonnx.partitioner.rewrites.windows import list_plain, pad_by_size, pads_by_size

Values = Sequence[ir.Value]


@dataclass(frozen=True, kw_only=True)
class _Transposed:
    """The attributes of a ConvTranspose, with one entry per spatial dimension.

    ``kernel`` is the size of the kernel.  ``before`` and ``after`` are the numbers of pixels to
    remove from each end of the output; if they are negative, pixels are added instead.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    groups: int

    @property
    def reach(self) -> tuple[int, ...]:
        """The number of pixels that a window spans, including the gaps of a dilation."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def taps(self) -> tuple[int, ...]:
        """The number of kernel elements in one phase."""
        return tuple(-(-r // s) for r, s in zip(self.reach, self.strides, strict=True))


def rewrite_conv(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite Conv as a Pad and a Conv if its padding depends on an unknown image size.

    This is the case if ``auto_pad`` is ``SAME_UPPER`` or ``SAME_LOWER``.  onnxruntime-training's
    gradient of Conv ignores this attribute.  Other Conv nodes are left unchanged.
    """
    if not pads_by_size(node):
        return None
    padded = pad_by_size(builder, node, 0.0)
    return builder.ops("Conv", [padded, *node.inputs[1:]], 1, list_plain(node))


def rewrite_conv_transpose(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite ConvTranspose as a single Conv that computes all phases of the output.

    With stride s, each phase consists of every s-th pixel along an axis.  The channels of the Conv
    are rearranged into the image, which is then cropped or padded if necessary.
    onnxruntime-training has no CPU kernel for the gradient of ConvTranspose.
    """
    x, w = node.inputs[:2]
    assert x is not None
    assert w is not None
    inputs, outputs, *kernel = require_sizes(node, w)
    window = _read_transposed(node, x, kernel)
    rank = len(kernel)
    margin = [t - 1 for t in window.taps]
    phases = _split_phases(builder, w, inputs, outputs, window)
    made = builder.op("Conv", x, phases, pads=[*margin, *margin], group=window.groups)
    batch, _, *spatial = read_extents(builder, node, x)
    extents: list[Extent] = [batch, outputs * window.groups * math.prod(window.strides)]
    extents += [add(builder, n, t) for n, t in zip(spatial, margin, strict=True)]
    if any(stride != 1 for stride in window.strides):
        made = spread_channels(builder, made, extents, window.strides)
    parts = zip(window.strides, window.taps, window.reach, window.after, strict=True)
    pads = [0, 0, *(-b for b in window.before), 0, 0, *(r - s * t - a for s, t, r, a in parts)]
    if any(pads):
        made = builder.op("Pad", made, builder.integers(pads), mode="constant")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        column = builder.op("Reshape", bias, builder.integers([-1, *([1] * rank)]))
        made = builder.op("Add", made, column)
    return [made]


def _read_transposed(node: ir.Node, x: ir.Value, kernel: Sequence[int]) -> _Transposed:
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    strides = tuple(node.attributes.get_ints("strides", ones))
    dilations = tuple(node.attributes.get_ints("dilations", ones))
    extra = node.attributes.get_ints("output_padding", zeros)
    for name, numbers in (
        ("strides", strides),
        ("dilations", dilations),
        ("output_padding", extra),
    ):
        if len(numbers) != len(kernel):  # ONNX Runtime runs a node with an empty list
            raise refuse(
                node,
                f"its {name} has {len(numbers)} numbers for {len(kernel)} axes of the kernel",
                "check how the model was exported",
            )
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    wanted = node.attributes.get_ints("output_shape", [])
    if wanted or mode.startswith("SAME"):
        parts = zip(kernel, dilations, strides, extra, strict=True)
        # the output size beyond ``stride`` times the input size
        surplus = [d * (k - 1) + 1 - s + e for k, d, s, e in parts]
        if wanted:
            sizes = require_sizes(node, x, 2)
            parts2 = zip(surplus, strides, sizes, wanted[-len(kernel) :], strict=True)
            surplus = [p + s * n - m for p, s, n, m in parts2]
        if not wanted and min(surplus) < 0:
            raise refuse(
                node,
                "with a kernel smaller than its stride, runtimes disagree on its automatic padding",
                "export it with explicit pads",
            )
        # an output that is larger than its windows cover ends in zeros
        before = [max(0, p) // 2 if mode == "SAME_UPPER" else (max(0, p) + 1) // 2 for p in surplus]
        after = [p - b for p, b in zip(surplus, before, strict=True)]
    else:
        pads = list(node.attributes.get_ints("pads", [])) if mode == "NOTSET" else []
        pads = pads or [0] * (2 * len(kernel))
        before, after = pads[: len(kernel)], pads[len(kernel) :]
    return _Transposed(
        kernel=tuple(kernel),
        strides=strides,
        dilations=dilations,
        before=tuple(before),
        after=tuple(a - e for a, e in zip(after, extra, strict=True)),
        groups=node.attributes.get_int("group", 1),
    )


def _split_phases(
    builder: NodeBuilder, w: ir.Value, inputs: int, outputs: int, window: _Transposed
) -> ir.Value:
    """Rearrange weights [C, M/g, k...] for a Conv with a channel per phase: [M * s, C/g, t...]."""
    rank, groups = len(window.kernel), window.groups
    w = _dilate_weights(builder, w, inputs, outputs, window)
    full = [t * s for t, s in zip(window.taps, window.strides, strict=True)]
    missing = [f - r for f, r in zip(full, window.reach, strict=True)]
    if any(missing):
        pads = builder.integers([0] * (2 + rank) + [0, 0, *missing])
        w = builder.op("Pad", w, pads, mode="constant")
    shape = [groups, inputs // groups, outputs]
    for taps, stride in zip(window.taps, window.strides, strict=True):
        shape += [taps, stride]
    w = builder.op("Reshape", w, builder.integers(shape))
    taps_axes, phase_axes = range(3, 3 + 2 * rank, 2), range(4, 4 + 2 * rank, 2)
    w = builder.op("Transpose", w, perm=[0, 2, *phase_axes, 1, *taps_axes])
    channels = groups * outputs * math.prod(window.strides)
    w = builder.op("Reshape", w, builder.integers([channels, inputs // groups, *window.taps]))
    for axis, taps in enumerate(
        window.taps
    ):  # a convolution reads its kernel in the other direction
        if taps > 1:
            backwards = builder.integers(range(taps - 1, -1, -1))
            w = builder.op("Gather", w, backwards, axis=2 + axis)
    return w


def _dilate_weights(
    builder: NodeBuilder, w: ir.Value, inputs: int, outputs: int, window: _Transposed
) -> ir.Value:
    """Insert zeros between the kernel's elements."""
    for axis, (k, d) in enumerate(zip(window.kernel, window.dilations, strict=True)):
        if d == 1 or k == 1:
            continue
        done, left = window.reach[:axis], window.kernel[axis + 1 :]
        w = builder.op("Unsqueeze", w, builder.integers([3 + axis]))
        rank = 3 + len(window.kernel)
        pads = [0] * (2 * rank)
        pads[rank + 3 + axis] = d - 1
        w = builder.op("Pad", w, builder.integers(pads), mode="constant")
        w = builder.op("Reshape", w, builder.integers([inputs, outputs, *done, k * d, *left]))
        pads = [0] * (2 * (rank - 1))
        pads[rank - 1 + 2 + axis] = 1 - d
        w = builder.op("Pad", w, builder.integers(pads), mode="constant")
    return w


def rewrite_col2im(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Col2Im as a ConvTranspose that adds the elements of each block to the image.

    onnxruntime-training has no gradient for Col2Im.  In the next round of rewriting, the
    ConvTranspose is rewritten as well.
    """
    x = node.inputs[0]
    assert x is not None
    image = [int(n) for n in require_array(node, 1, "image's sizes")]
    block = [int(n) for n in require_array(node, 2, "block's sizes")]
    rank, size = len(image), math.prod(block)
    ones = [1] * rank
    strides = list(node.attributes.get_ints("strides", ones))
    dilations = list(node.attributes.get_ints("dilations", ones))
    pads = list(node.attributes.get_ints("pads", [0] * (2 * rank)))
    limit(node, size**2)
    batch, rows, _ = read_extents(builder, node, x)
    if not isinstance(rows, int):
        raise refuse(node, "its number of channels is not known", "export it with a fixed one")
    room = [
        n + pads[i] + pads[rank + i] - d * (k - 1) - 1
        for i, (n, k, d) in enumerate(zip(image, block, dilations, strict=True))
    ]
    steps = [r // s + 1 for r, s in zip(room, strides, strict=True)]
    dtype = x.dtype
    assert dtype is not None
    places = np.eye(size, dtype=np.float32).reshape(size, 1, *block)
    columns = reshape(builder, x, [multiply(builder, [batch, rows // size]), size, *steps])
    made = builder.op(
        "ConvTranspose",
        columns,
        builder.tensor(ir.tensor(places.astype(dtype.numpy()))),
        strides=strides,
        dilations=dilations,
        pads=pads,
        output_padding=[r % s for r, s in zip(room, strides, strict=True)],
    )
    return [reshape(builder, made, [batch, rows // size, *image])]
