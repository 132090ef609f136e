"""Read the windows of pooling nodes, sum their elements, and count them.

This module also adds padding if its width is known only at run time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims
from splitonnx.partitioner.graphs.tables import limit
from splitonnx.partitioner.normalization.explicit_padding import count_windows, read_kernel
from splitonnx.partitioner.rewrites.shape_rules import refuse, require_rank


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of a pooling node; each field has one entry per spatial dimension of the image.

    ``before`` is the width of the padding at the start of a dimension.  ``after`` is the number of
    elements by which the windows extend beyond its end.  ``counted`` is the width of the padding at
    the end in the model; it may differ from ``after`` if the node has ``ceil_mode``.  ``sizes``
    contains the sizes of the image, with ``None`` for each unknown size.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    counted: tuple[int, ...]
    sizes: tuple[int | None, ...]

    @property
    def attributes(self) -> dict[str, Sequence[int]]:
        """The strides, dilations and padding as attributes of a Conv or pooling node."""
        return {
            "strides": self.strides,
            "dilations": self.dilations,
            "pads": (*self.before, *self.after),
        }


def read_windows(node: ir.Node) -> Windows:
    """Read the windows of a pooling node.

    Raises:
        UnsupportedModel: the windows depend on an unknown image size.
    """
    x = node.inputs[0]
    assert x is not None
    kernel, dims = read_kernel(node), known_dims(x)
    if kernel is None or dims is None or pads_by_size(node):
        raise refuse(
            node,
            "its automatic padding depends on the image's size, which is not known",
            "fix it with --dim NAME=SIZE, or export the model with explicit pads",
        )
    rank = len(kernel)
    ones = [1] * rank
    strides = node.attributes.get_ints("strides", ones)
    dilations = node.attributes.get_ints("dilations", ones)
    pads = node.attributes.get_ints("pads", [0] * (2 * rank))
    after = list(pads[rank:])
    if node.attributes.get_int("ceil_mode", 0):
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
        for axis, (n, r, s) in enumerate(zip(dims[2:], reach, strides, strict=True)):
            after[axis] += _find_surplus(node, n, r, s, pads[axis], after[axis])
    return Windows(
        kernel=tuple(kernel),
        strides=tuple(strides),
        dilations=tuple(dilations),
        before=tuple(pads[:rank]),
        after=tuple(after),
        counted=tuple(pads[rank:]),
        sizes=tuple(dims[2:]),
    )


def _find_surplus(
    node: ir.Node, size: int | None, reach: int, stride: int, before: int, after: int
) -> int:
    """Return the padding that ``ceil_mode`` adds."""
    if size is not None:
        count = count_windows(size, reach, stride, before, after)
        return (count - 1) * stride + reach - size - before - after
    if reach < after + stride:  # a window might start behind the image
        raise refuse(
            node,
            "its ceil_mode depends on the image's size, which is not known",
            "fix it with --dim NAME=SIZE, or export the model with a fixed image size",
        )
    return stride - 1


def sum_windows(builder: NodeBuilder, node: ir.Node, x: ir.Value, windows: Windows) -> ir.Value:
    """Sum the elements of each window, separately for each channel.

    The sums are computed by a depthwise convolution with weights that are all 1.

    Raises:
        UnsupportedModel: the number of channels is unknown.
    """
    channels = (known_dims(x) or [None, None])[1]
    if channels is None or x.dtype is None:
        raise refuse(node, "its number of channels is not known", "export it with a fixed one")
    limit(node, channels * math.prod(windows.kernel))
    ones = np.ones((channels, 1, *windows.kernel), x.dtype.numpy())
    return _convolve(builder, x, ones, windows)


def _convolve(builder: NodeBuilder, x: ir.Value, kernel: np.ndarray, windows: Windows) -> ir.Value:
    weights = builder.tensor(ir.tensor(kernel))
    pads = (*windows.before, *windows.after)
    if min(pads) < 0:
        full = [0, 0, *windows.before, 0, 0, *windows.after]
        x = builder.op("Pad", x, builder.integers(full), mode="constant")
        pads = (0,) * len(pads)
    return builder.op(
        "Conv",
        x,
        weights,
        strides=windows.strides,
        dilations=windows.dilations,
        pads=pads,
        group=len(kernel),
    )


def count_elements(
    builder: NodeBuilder, node: ir.Node, x: ir.Value, windows: Windows, *, include_padding: bool
) -> ir.Value:
    """Count the elements in each window, including the padding if ``include_padding`` is true.

    The result has the shape (1, 1, L...), where L... are the sizes of the pooled image, so it can
    be broadcast to that image.
    """
    assert x.dtype is not None
    limit(node, _estimate_counts(windows))
    numbers = [size for size in windows.sizes if size is not None]
    if len(numbers) == len(windows.sizes):
        counts = _count_elements(windows, numbers, include_padding=include_padding)
        return builder.tensor(ir.tensor(counts.astype(x.dtype.numpy())))
    shape = builder.op("Concat", builder.integers([1, 1]), builder.shape(x, 2), axis=0)
    image = builder.op("Expand", builder.number(1.0, x.dtype), shape)
    if include_padding:
        widths = builder.integers([0, 0, *windows.before, 0, 0, *windows.counted])
        image = builder.op("Pad", image, widths, builder.number(1.0, x.dtype), mode="constant")
        pairs = zip(windows.after, windows.counted, strict=True)
        rest = tuple(whole - counted for whole, counted in pairs)
        windows = Windows(
            kernel=windows.kernel,
            strides=windows.strides,
            dilations=windows.dilations,
            before=(0,) * len(rest),
            after=rest,
            counted=rest,
            sizes=windows.sizes,
        )
    ones = np.ones((1, 1, *windows.kernel), x.dtype.numpy())
    return builder.detach(_convolve(builder, image, ones, windows))


def _estimate_counts(windows: Windows) -> float:
    """Estimate the cost of counting: a table of the taps along each axis, and the counts."""
    total, counts = 0, 1
    for axis, size in enumerate(windows.sizes):
        kernel, dilation = windows.kernel[axis], windows.dilations[axis]
        inside = windows.before[axis] + (size or 0) + windows.after[axis]
        starts = max(0, inside - dilation * (kernel - 1)) // windows.strides[axis] + 1
        total += inside + starts * kernel
        counts *= starts if size is not None else kernel
    return total + counts


def _count_elements(windows: Windows, sizes: Sequence[int], *, include_padding: bool) -> np.ndarray:
    rank = len(sizes)
    counts = np.ones([1] * (2 + rank))
    for axis, n in enumerate(sizes):
        before, counted = windows.before[axis], windows.counted[axis]
        inside = np.zeros(before + n + windows.after[axis])
        margin = (0, before + n + counted) if include_padding else (before, before + n)
        inside[slice(*margin)] = 1.0
        reach = windows.dilations[axis] * (windows.kernel[axis] - 1) + 1
        starts = np.arange(0, len(inside) - reach + 1, windows.strides[axis])
        taps = np.arange(windows.kernel[axis]) * windows.dilations[axis]
        shape = [1] * (2 + rank)
        shape[2 + axis] = -1
        counts = counts * inside[starts[:, None] + taps].sum(1).reshape(shape)
    return counts


def pads_by_size(node: ir.Node) -> bool:
    """Return whether ``auto_pad`` makes the padding of a node depend on the image size."""
    return node.attributes.get_string("auto_pad", "NOTSET").startswith("SAME")


def pad_by_size(builder: NodeBuilder, node: ir.Node, number: float) -> ir.Value:
    """Add the padding that a node's ``auto_pad`` requires to the node's input.

    Return the padded input.  The added elements are ``number``.  The graph computes the widths of
    the padding from the image size.

    Raises:
        UnsupportedModel: the size of the windows is unknown.
    """
    x, kernel = node.inputs[0], read_kernel(node)
    assert x is not None
    if kernel is None:
        raise refuse(node, "the shape of its kernel is not known", "export it with explicit pads")
    rank = require_rank(node, x) - 2
    strides = builder.integers(node.attributes.get_ints("strides", [1] * rank))
    dilations = node.attributes.get_ints("dilations", [1] * rank)
    reach = builder.integers([d * (k - 1) for k, d in zip(kernel, dilations, strict=True)])
    zero, one, two = (builder.integers([n]) for n in (0, 1, 2))
    size = builder.shape(x, 2)
    # the last window starts at the last multiple of the stride inside the image
    last = builder.op("Sub", size, one)
    start = builder.op("Mul", builder.op("Div", last, strides), strides)
    total = builder.op("Max", builder.op("Sub", builder.op("Add", start, reach), last), zero)
    small = builder.op("Div", total, two)
    large = builder.op("Sub", total, small)
    if node.attributes.get_string("auto_pad", "") == "SAME_LOWER":
        small, large = large, small
    none = builder.integers([0, 0])
    widths = builder.op("Concat", none, small, none, large, axis=0)
    return builder.op("Pad", x, widths, builder.number(number, x.dtype), mode="constant")


def list_plain(node: ir.Node) -> dict[str, ir.Attr]:
    """Return the attributes of a node, without those that describe its padding."""
    return {n: v for n, v in node.attributes.items() if n not in ("auto_pad", "pads")}
