"""Replace the gradients of MaxPool and AveragePool with standard ONNX operators.

Each of these gradients has the shape of the pooling node's input.  The size of the input image is
therefore read from the declared shape of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims
from splitonnx.partitioner.graphs.faults import describe_node
from splitonnx.partitioner.graphs.tables import limit

Values = Sequence[ir.Value | None]


def _read_extent(node: ir.Node) -> list[int]:
    """Return the image size of the pooled input, which is also the image size of its gradient."""
    dims = known_dims(node.outputs[0])
    if dims is None or None in dims[2:]:
        raise UnsupportedModel(
            describe_node(node),
            "the image size of the pooled input is not known",
            "fix it with --dim NAME=SIZE, or export the model with a fixed image size",
        )
    return [dim for dim in dims[2:] if dim is not None]


def lower_max_pool_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace MaxPoolGrad with ScatterElements.

    Each element of the output's gradient is added at the position of the largest element in its
    window.  These positions are the second output of MaxPool; they index the flattened input,
    including the batch and channel axes.
    """
    dy, indices = node.inputs[:2]
    assert dy is not None
    assert indices is not None
    shape = builder.op(
        "Concat", builder.shape(dy, 0, 2), builder.integers(_read_extent(node)), axis=0
    )
    everything = builder.integers([-1])
    total = builder.op("ReduceProd", shape, keepdims=1)
    zeros = builder.op("Expand", builder.number(0.0, dy.dtype), total)
    placed = builder.op(
        "ScatterElements",
        zeros,
        builder.op("Reshape", indices, everything),
        builder.op("Reshape", dy, everything),
        axis=0,
        reduction="add",
    )
    return [builder.op("Reshape", placed, shape)]


def is_sized(node: ir.Node) -> bool:
    """Return whether the graph declares the sizes that the kernel of a MaxPoolGrad reads there.

    In onnxruntime-training 1.19.2, it takes all sizes but that of the batch from the graph, and 0
    for one that is not known: it then writes outside of its output.
    """
    dims = known_dims(node.outputs[0])
    return dims is not None and None not in dims[1:]


def check_indices(builder: NodeBuilder, node: ir.Node) -> Values:
    """Return the inputs of a MaxPoolGrad, with indices that lie in their own channels.

    The index of a window without a number above the lowest float, such as one of -inf or NaN alone,
    is before its channel: the gradient would be added to another channel, or written before the
    first one, outside of the output.  The maximum of such a window is a constant, so its gradient
    becomes 0.
    """
    dy, indices = node.inputs[:2]
    assert dy is not None
    assert indices is not None
    rows = builder.shape(dy, 0, 2)
    count = builder.op("ReduceProd", rows, keepdims=0)
    channels = builder.op("Range", builder.integer(0), count, builder.integer(1))
    starts = builder.op("Mul", channels, builder.integer(math.prod(_read_extent(node))))
    shape = builder.op("Concat", rows, builder.integers([1] * len(_read_extent(node))), axis=0)
    starts = builder.op("Reshape", starts, shape)
    outside = builder.op("Less", indices, starts)
    gradient = builder.op("Where", outside, builder.number(0.0, dy.dtype), dy)
    gradient.type, gradient.shape = dy.type, dy.shape
    inside = builder.op("Max", indices, starts)
    inside.type, inside.shape = indices.type, indices.shape
    return [gradient, inside]


def lower_average_pool_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace AveragePoolGrad with a depthwise ConvTranspose.

    Each element of the output's gradient is divided by the number of elements in its window, and
    the quotient is added at the position of each of these elements.

    Raises:
        UnsupportedModel: the image size is unknown; the AveragePool is dilated; or the average
            counts padding and a window extends beyond it, a case in which runtimes disagree.
    """
    dy = node.inputs[0]
    assert dy is not None
    extent = _read_extent(node)
    dims = known_dims(node.outputs[0]) or []
    rank = len(extent)
    kernel = list(node.attributes.get_ints("kernel_shape"))
    strides = list(node.attributes.get_ints("strides", [1] * rank))
    pads = list(node.attributes.get_ints("pads", [0] * (2 * rank)))
    if any(step != 1 for step in node.attributes.get_ints("dilations", [])):
        raise UnsupportedModel(describe_node(node), "a dilated AveragePool has no gradient here")
    steps = [
        -(-(n + pads[i] + pads[i + rank] - k) // s) + 1
        if node.attributes.get_int("ceil_mode", 0)
        else (n + pads[i] + pads[i + rank] - k) // s + 1
        for i, (n, k, s) in enumerate(zip(extent, kernel, strides, strict=True))
    ]
    include = bool(node.attributes.get_int("count_include_pad", 0))
    if include and any(
        (m - 1) * s + k > n + pads[i] + pads[i + rank]
        for i, (n, k, s, m) in enumerate(zip(extent, kernel, strides, steps, strict=True))
    ):
        raise UnsupportedModel(
            describe_node(node),
            "with ceil_mode and count_include_pad a window reaches beyond the padding, which "
            "runtimes count differently",
            "export the model without ceil_mode",
        )
    limit(node, math.prod(kernel) + sum(steps) + math.prod(steps))
    counts = _count_windows(extent, kernel, strides, pads, steps, include=include)
    dtype = dy.dtype
    assert dtype is not None
    divisor = builder.tensor(ir.tensor(counts.astype(dtype.numpy())))
    shared = builder.op("Div", dy, divisor)
    # channels become part of the batch, so that one kernel of ones is enough for all
    flat = builder.op("Reshape", shared, builder.integers([-1, 1, *steps]))
    ones = builder.tensor(ir.tensor(np.ones((1, 1, *kernel), dtype.numpy())))
    whole = builder.op("ConvTranspose", flat, ones, strides=strides)
    reach = [(m - 1) * s + k for m, s, k in zip(steps, strides, kernel, strict=True)]
    margin = [max(0, pads[i] + n - r) for i, (n, r) in enumerate(zip(extent, reach, strict=True))]
    if any(margin):
        padding = builder.integers([0] * (2 + rank) + [0, 0, *margin])
        whole = builder.op("Pad", whole, padding, mode="constant")
    start = pads[:rank]
    end = [b + n for b, n in zip(start, extent, strict=True)]
    axes = builder.integers(range(2, 2 + rank))
    part = builder.op("Slice", whole, builder.integers(start), builder.integers(end), axes)
    channels = builder.integers([dims[1]]) if dims[1] is not None else builder.shape(dy, 1, 2)
    shape = builder.op(
        "Concat", builder.shape(dy, 0, 1), channels, builder.integers(extent), axis=0
    )
    return [builder.op("Reshape", part, shape)]


def _count_windows(
    extent: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    steps: Sequence[int],
    *,
    include: bool,
) -> np.ndarray:
    """Count the elements that each window averages; with ``include``, padding counts as well."""
    counts = np.ones((1, 1, *([1] * len(extent))))
    rank = len(extent)
    for axis, (n, k, s, m) in enumerate(zip(extent, kernel, strides, steps, strict=True)):
        begin = np.arange(m) * s - pads[axis]
        # a window added by ceil_mode may extend beyond the padding; that part never counts
        low, high = (-pads[axis], n + pads[axis + rank]) if include else (0, n)
        along = np.minimum(begin + k, high) - np.maximum(begin, low)
        shape = [1] * (2 + rank)
        shape[2 + axis] = m
        counts = counts * along.reshape(shape)
    return counts
