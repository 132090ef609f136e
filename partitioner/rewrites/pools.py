"""Rewrite pooling nodes that onnxruntime-training 1.19.2 differentiates wrongly or not at all.

The gradient operators MaxPoolGrad and AveragePoolGrad need a fixed image size.  In addition,
MaxPoolGrad needs a fixed number of channels and row-major indices, and AveragePoolGrad ignores
dilations.  The formulas are those of the pooling operators and LRN-13 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, known_dims, take_input
from splitonnx.partitioner.graphs.tables import limit
from splitonnx.partitioner.rewrites.shape_rules import (
    Extent,
    add,
    join,
    multiply,
    read_extents,
    refuse,
    require_rank,
    to_vector,
)
from splitonnx.partitioner.rewrites.windows import (
    count_elements,
    list_plain,
    pad_by_size,
    pads_by_size,
    read_windows,
    sum_windows,
)

Values = Sequence[ir.Value | None]


def _has_fixed_size(x: ir.Value, first: int = 2) -> bool:
    """Return whether the dimensions of ``x`` from ``first`` are known; 2 is that of the image."""
    dims = known_dims(x)
    return dims is not None and None not in dims[first:]


def rewrite_average_pool(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite AveragePool as the sum of each window divided by the number of its elements.

    A node is left unchanged if onnxruntime-training's gradient can be used.  This is the case if
    the image size is fixed and the node has neither dilations nor ``ceil_mode``.
    """
    x = take_input(node)
    included = bool(node.attributes.get_int("count_include_pad", 0))
    spread = any(step != 1 for step in node.attributes.get_ints("dilations", []))
    ragged = bool(node.attributes.get_int("ceil_mode", 0))
    if _has_fixed_size(x) and not spread and not ragged:
        return None
    windows = read_windows(node)
    counts = count_elements(builder, node, x, windows, include_padding=included)
    return [builder.op("Div", sum_windows(builder, node, x, windows), counts)]


def rewrite_max_pool(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite MaxPool if onnxruntime-training's gradient cannot be used.

    A node with column-major indices becomes a MaxPool with row-major indices, which the gradient
    needs; the column-major indices are computed separately.  If the image size or the number of
    channels is unknown, the largest elements are gathered by their indices: MaxPoolGrad writes to
    memory of the size that the graph declares, in which an unknown dimension counts as 0.  Padding
    that depends on the image size is added by a separate Pad.  Other nodes are left unchanged.
    """
    x = take_input(node)
    lowest = float(np.finfo((x.dtype or ir.DataType.FLOAT).numpy()).min)
    if pads_by_size(node) and len(node.outputs) == 1:
        return builder.ops("MaxPool", [pad_by_size(builder, node, lowest)], 1, list_plain(node))
    column_major = bool(node.attributes.get_int("storage_order", 0))
    fixed = _has_fixed_size(x, first=1)
    if fixed and not column_major:
        return None
    plain = {name: value for name, value in node.attributes.items() if name != "storage_order"}
    places: ir.Value | None = None
    if column_major and len(node.outputs) > 1:
        places = builder.ops("MaxPool", [builder.detach(x)], 2, dict(node.attributes))[1]
    if fixed:
        return [builder.ops("MaxPool", [x], 1, plain)[0], places]
    read_windows(node)  # raises an error if the windows are unknown
    largest, indices = builder.ops("MaxPool", [builder.detach(x)], 2, plain)
    # the index of a window without a number above the lowest one is that of another channel
    found = builder.op("Greater", largest, builder.number(lowest, x.dtype))
    index = builder.op("Where", found, indices, builder.integer(0))
    everything = builder.op("Reshape", x, builder.integers([-1]))
    gathered = builder.op("Gather", everything, index, axis=0)
    found.type = ir.TensorType(ir.DataType.BOOL)
    largest.type = gathered.type = x.type
    for value in (found, largest, gathered):
        value.shape = node.outputs[0].shape
    return [builder.op("Where", found, gathered, builder.detach(largest)), places or indices]


def rewrite_global_max_pool(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite GlobalMaxPool with ArgMax and GatherElements.

    If the maximum of a channel occurs several times, only its first occurrence gets the gradient.
    onnxruntime-training has no gradient for GlobalMaxPool.
    """
    x = take_input(node)
    rank = require_rank(node, x)
    flat = builder.op("Reshape", x, builder.integers([0, 0, -1]))
    place = builder.op("ArgMax", builder.detach(flat), axis=2, keepdims=1)
    largest = builder.op("GatherElements", flat, place, axis=2)
    if rank == 3:
        return [largest]
    return [builder.op("Unsqueeze", largest, builder.integers(range(3, rank)))]


def rewrite_lp_pool(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite LpPool as the p-norm of the elements in each window.

    If a norm is 0, its gradient is 0.  onnxruntime-training has no gradient for LpPool.
    """
    windows = read_windows(node)
    power = node.attributes.get_int("p", 2)
    total = sum_windows(builder, node, _raise(builder, take_input(node), power), windows)
    return [_take_root(builder, total, power, take_input(node).dtype)]


def rewrite_global_lp_pool(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite GlobalLpPool as the p-norm of the elements of each channel.

    If a norm is 0, its gradient is 0.  onnxruntime-training has no gradient for GlobalLpPool.
    """
    x = take_input(node)
    power = node.attributes.get_int("p", 2)
    axes = builder.integers(range(2, require_rank(node, x)))
    total = builder.op("ReduceSum", _raise(builder, x, power), axes, keepdims=1)
    return [_take_root(builder, total, power, x.dtype)]


def _raise(builder: NodeBuilder, x: ir.Value, power: int) -> ir.Value:
    """Return |x| ** p with the type and shape of x."""
    if power == 2:
        raised = builder.op("Mul", x, x)
    else:
        raised = builder.op("Abs", x)
        if power != 1:
            raised = builder.op("Pow", raised, builder.number(power, x.dtype))
    raised.type, raised.shape = x.type, x.shape
    return raised


def _take_root(
    builder: NodeBuilder, total: ir.Value, power: int, dtype: ir.DataType | None
) -> ir.Value:
    """Return the p-th root; its slope at 0, where the root has no derivative, is 0."""
    if power == 1:
        return total
    zero, one = builder.number(0.0, dtype), builder.number(1.0, dtype)
    positive = builder.op("Greater", total, zero)
    safe = builder.op("Where", positive, total, one)
    if power == 2:
        root = builder.op("Sqrt", safe)
    else:
        root = builder.op("Pow", safe, builder.number(1.0 / power, dtype))
    return builder.op("Where", positive, root, zero)


def rewrite_max_unpool(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite MaxUnpool with ScatterND, which writes the elements into an image of zeros.

    If the node requests an output shape, the image is then padded to that shape.
    onnxruntime-training has no gradient for MaxUnpool.
    """
    x, indices, *further = node.inputs
    assert x is not None
    assert indices is not None
    kernel = node.attributes.get_ints("kernel_shape")
    rank = len(kernel)
    strides = node.attributes.get_ints("strides", [1] * rank)
    pads = node.attributes.get_ints("pads", [0] * (2 * rank))
    batch, channels, *image = read_extents(builder, node, x)
    extents: list[Extent] = [batch, channels]
    for axis, n in enumerate(image):
        rest = kernel[axis] - strides[axis] - pads[axis] - pads[rank + axis]
        extents.append(add(builder, multiply(builder, [n, strides[axis]]), rest))
    total = to_vector(builder, multiply(builder, extents))
    zeros = builder.op("Expand", builder.number(0.0, x.dtype), total)
    rows = builder.op("Reshape", indices, builder.integers([-1, 1]))
    elements = builder.op("Reshape", x, builder.integers([-1]))
    placed = builder.op("ScatterND", zeros, rows, elements)
    made = builder.op("Reshape", placed, join(builder, extents))
    wanted = further[0] if further else None
    if wanted is None:
        return [made]
    sizes, known = known_array(wanted), [n for n in extents if isinstance(n, int)]
    if sizes is not None and len(known) == len(extents):
        more = builder.integers([int(m) - n for m, n in zip(sizes, known, strict=True)])
    else:
        more = builder.op("Sub", wanted, join(builder, extents))
    begin = builder.integers([0] * (2 + rank))
    return [builder.op("Pad", made, builder.op("Concat", begin, more, axis=0), mode="constant")]


def rewrite_lrn(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite LRN as x / (bias + alpha / size * s) ** beta.

    Here ``bias``, ``alpha``, ``beta`` and ``size`` are attributes of the node, and s is the sum of
    the squares of ``size`` neighbouring channels.  This sum is computed by a convolution, for which
    the channels are treated as the rows of an image.  onnxruntime-training has no gradient for LRN.
    """
    x = take_input(node)
    size = node.attributes.get_int("size")
    channels = (known_dims(x) or [None, None])[1]
    if channels is None or x.dtype is None:
        raise refuse(node, "its number of channels is not known", "export it with a fixed one")
    limit(node, size)
    squares = builder.op("Mul", x, x)
    rows = builder.op("Reshape", squares, builder.integers([0, 1, channels, -1]))
    ones = builder.tensor(ir.tensor(np.ones((1, 1, size, 1), x.dtype.numpy())))
    before = (size - 1) // 2
    total = builder.op("Conv", rows, ones, pads=[before, 0, math.ceil((size - 1) / 2), 0])
    total = builder.op("Reshape", total, builder.shape(x))
    alpha = node.attributes.get_float("alpha", 1e-4) / size
    base = builder.op("Mul", total, builder.number(alpha, x.dtype))
    base = builder.op("Add", base, builder.number(node.attributes.get_float("bias", 1.0), x.dtype))
    beta = node.attributes.get_float("beta", 0.75)
    return [builder.op("Div", x, builder.op("Pow", base, builder.number(beta, x.dtype)))]
