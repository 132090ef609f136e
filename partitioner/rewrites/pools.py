"""Poolings that have no gradient, or a wrong one, in onnxruntime-training 1.19.2.

Its MaxPoolGrad and AveragePoolGrad need a fixed image size; the first takes indices for row-major,
the second knows no dilations.  Formulas: the poolings and LRN-13 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, known_dims, take_input
from splitonnx.partitioner.graphs.tables import limit
from splitonnx.partitioner.rewrites.extents import (
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


def _has_fixed_image(x: ir.Value) -> bool:
    dims = known_dims(x)
    return dims is not None and None not in dims[2:]


def rewrite_average_pool(draft: NodeBuilder, node: ir.Node) -> Values | None:
    """The sum of each window through its count, where AveragePool's gradient is not to be had."""
    x = take_input(node)
    included = bool(node.attributes.get_int("count_include_pad", 0))
    spread = any(step != 1 for step in node.attributes.get_ints("dilations", []))
    ragged = bool(node.attributes.get_int("ceil_mode", 0))
    if _has_fixed_image(x) and not spread and not ragged:
        return None
    windows = read_windows(node)
    counts = count_elements(draft, node, x, windows, include_padding=included)
    return [draft.op("Div", sum_windows(draft, node, x, windows), counts)]


def rewrite_max_pool(draft: NodeBuilder, node: ir.Node) -> Values | None:
    """Row-major indices for the gradient; with any image size, the elements gathered by them."""
    x = take_input(node)
    if pads_by_size(node) and len(node.outputs) == 1:
        lowest = float(np.finfo((x.dtype or ir.DataType.FLOAT).numpy()).min)
        return draft.ops("MaxPool", [pad_by_size(draft, node, lowest)], 1, list_plain(node))
    column_major = bool(node.attributes.get_int("storage_order", 0))
    if _has_fixed_image(x) and not column_major:
        return None
    plain = {name: value for name, value in node.attributes.items() if name != "storage_order"}
    places: ir.Value | None = None
    if column_major and len(node.outputs) > 1:
        places = draft.ops("MaxPool", [draft.detach(x)], 2, dict(node.attributes))[1]
    if _has_fixed_image(x):
        return [draft.ops("MaxPool", [x], 1, plain)[0], places]
    read_windows(node)  # refuses what it cannot know
    indices = draft.ops("MaxPool", [draft.detach(x)], 2, plain)[1]
    everything = draft.op("Reshape", x, draft.integers([-1]))
    return [draft.op("Gather", everything, indices, axis=0), places or indices]


def rewrite_global_max_pool(draft: NodeBuilder, node: ir.Node) -> Values:
    """The largest element of each channel, the first of equals."""
    x = take_input(node)
    rank = require_rank(node, x)
    flat = draft.op("Reshape", x, draft.integers([0, 0, -1]))
    place = draft.op("ArgMax", draft.detach(flat), axis=2, keepdims=1)
    largest = draft.op("GatherElements", flat, place, axis=2)
    if rank == 3:
        return [largest]
    return [draft.op("Unsqueeze", largest, draft.integers(range(3, rank)))]


def rewrite_lp_pool(draft: NodeBuilder, node: ir.Node) -> Values:
    """The p-norm of each window."""
    windows = read_windows(node)
    power = node.attributes.get_int("p", 2)
    total = sum_windows(draft, node, _raise(draft, take_input(node), power), windows)
    return [_take_root(draft, total, power, take_input(node).dtype)]


def rewrite_global_lp_pool(draft: NodeBuilder, node: ir.Node) -> Values:
    """The p-norm of each channel."""
    x = take_input(node)
    power = node.attributes.get_int("p", 2)
    axes = draft.integers(range(2, require_rank(node, x)))
    total = draft.op("ReduceSum", _raise(draft, x, power), axes, keepdims=1)
    return [_take_root(draft, total, power, x.dtype)]


def _raise(draft: NodeBuilder, x: ir.Value, power: int) -> ir.Value:
    """|x| ** p, with its type and shape."""
    if power == 2:
        raised = draft.op("Mul", x, x)
    else:
        raised = draft.op("Abs", x)
        if power != 1:
            raised = draft.op("Pow", raised, draft.number(power, x.dtype))
    raised.type, raised.shape = x.type, x.shape
    return raised


def _take_root(
    draft: NodeBuilder, total: ir.Value, power: int, dtype: ir.DataType | None
) -> ir.Value:
    """The p-th root, with slope 0 at 0, where it has none."""
    if power == 1:
        return total
    zero, one = draft.number(0.0, dtype), draft.number(1.0, dtype)
    positive = draft.op("Greater", total, zero)
    safe = draft.op("Where", positive, total, one)
    if power == 2:
        root = draft.op("Sqrt", safe)
    else:
        root = draft.op("Pow", safe, draft.number(1.0 / power, dtype))
    return draft.op("Where", positive, root, zero)


def rewrite_max_unpool(draft: NodeBuilder, node: ir.Node) -> Values:
    """Write each element to its position in an image of zeros; a wanted shape adds more zeros."""
    x, indices, *further = node.inputs
    assert x is not None
    assert indices is not None
    kernel = node.attributes.get_ints("kernel_shape")
    rank = len(kernel)
    strides = node.attributes.get_ints("strides", [1] * rank)
    pads = node.attributes.get_ints("pads", [0] * (2 * rank))
    batch, channels, *image = read_extents(draft, node, x)
    extents: list[Extent] = [batch, channels]
    for axis, n in enumerate(image):
        rest = kernel[axis] - strides[axis] - pads[axis] - pads[rank + axis]
        extents.append(add(draft, multiply(draft, [n, strides[axis]]), rest))
    total = to_vector(draft, multiply(draft, extents))
    zeros = draft.op("Expand", draft.number(0.0, x.dtype), total)
    rows = draft.op("Reshape", indices, draft.integers([-1, 1]))
    elements = draft.op("Reshape", x, draft.integers([-1]))
    placed = draft.op("ScatterND", zeros, rows, elements)
    made = draft.op("Reshape", placed, join(draft, extents))
    wanted = further[0] if further else None
    if wanted is None:
        return [made]
    sizes, known = known_array(wanted), [n for n in extents if isinstance(n, int)]
    if sizes is not None and len(known) == len(extents):
        more = draft.integers([int(m) - n for m, n in zip(sizes, known, strict=True)])
    else:
        more = draft.op("Sub", wanted, join(draft, extents))
    begin = draft.integers([0] * (2 + rank))
    return [draft.op("Pad", made, draft.op("Concat", begin, more, axis=0), mode="constant")]


def rewrite_lrn(draft: NodeBuilder, node: ir.Node) -> Values:
    """x / (bias + alpha / size * the squares of the neighbouring channels) ** beta.

    The sum over neighbours is a convolution along the channels, which become an image's rows.
    """
    x = take_input(node)
    size = node.attributes.get_int("size")
    channels = (known_dims(x) or [None, None])[1]
    if channels is None or x.dtype is None:
        raise refuse(node, "its number of channels is not known", "export it with a fixed one")
    limit(node, size)
    squares = draft.op("Mul", x, x)
    rows = draft.op("Reshape", squares, draft.integers([0, 1, channels, -1]))
    ones = draft.tensor(ir.tensor(np.ones((1, 1, size, 1), x.dtype.numpy())))
    before = (size - 1) // 2
    total = draft.op("Conv", rows, ones, pads=[before, 0, math.ceil((size - 1) / 2), 0])
    total = draft.op("Reshape", total, draft.shape(x))
    alpha = node.attributes.get_float("alpha", 1e-4) / size
    base = draft.op("Mul", total, draft.number(alpha, x.dtype))
    base = draft.op("Add", base, draft.number(node.attributes.get_float("bias", 1.0), x.dtype))
    beta = node.attributes.get_float("beta", 0.75)
    return [draft.op("Div", x, draft.op("Pow", base, draft.number(beta, x.dtype)))]
