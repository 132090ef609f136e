"""Replace operators that move, select or scale elements, and the gradients of these operators.

The replacements use only standard ONNX operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims, require_rank, take_inputs

Values = Sequence[ir.Value | None]


def _zeros(builder: NodeBuilder, shape: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    return builder.op("Expand", builder.number(0.0, dtype), shape)


def lower_scale(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace Scale with Mul, or with Div if ``scale_down`` is set."""
    x, scale = take_inputs(node, 2)
    kind = "Div" if node.attributes.get_int("scale_down", 0) else "Mul"
    return [builder.op(kind, x, builder.cast(scale, x.dtype))]


def lower_concat(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace ConcatTraining with Concat.

    The second output of ConcatTraining contains the length of each input along the axis; it is
    computed with Shape.
    """
    axis = node.attributes.get_int("axis")
    values = [value for value in node.inputs if value is not None]
    rank = require_rank(node, values[0])
    along = axis % rank
    lengths = [builder.op("Shape", value, start=along, end=along + 1) for value in values]
    return [
        builder.op("Concat", *values, axis=axis),
        builder.op("Concat", *lengths, axis=0) if len(node.outputs) > 1 else None,
    ]


def lower_split(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace SplitTraining, which reads the lengths of its outputs from an input, with Split."""
    x, extents = take_inputs(node, 2)
    axis = node.attributes.get_int("axis", 0)
    return builder.ops("Split", [x, extents], len(node.outputs), {"axis": axis})


def lower_slice_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace SliceGrad with ScatterElements.

    Each element of the output's gradient is written at the position from which the output element
    was selected; all other positions contain zero.  The starts, ends and steps may have any values.
    """
    dy, shape, *selection = node.inputs
    assert dy is not None
    assert shape is not None
    total = builder.op("ReduceProd", shape, keepdims=0)
    places = builder.op("Range", builder.integer(0), total, builder.integer(1))
    chosen = builder.op("Slice", builder.op("Reshape", places, shape), *selection)
    everything = builder.integers([-1])
    flat = builder.op("Reshape", total, builder.integers([1]))
    placed = builder.op(
        "ScatterElements",
        _zeros(builder, flat, dy.dtype),
        builder.op("Reshape", chosen, everything),
        builder.op("Reshape", dy, everything),
        axis=0,
    )
    return [builder.op("Reshape", placed, shape)]


def lower_gather_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace GatherGrad with ScatterND.

    Each row of the output's gradient is added at the position from which the output row was
    gathered.
    """
    shape, indices, dy = take_inputs(node, 3)
    rank, span = require_rank(node, node.outputs[0]), require_rank(node, indices)
    axis = node.attributes.get_int("axis", 0) % rank
    front = [*range(axis, axis + span), *range(axis), *range(axis + span, rank - 1 + span)]
    order = [axis, *(a for a in range(rank) if a != axis)]
    if front != sorted(front):  # ORT assumes that any Transpose after a Gemm swaps axes
        dy = builder.op("Transpose", dy, perm=front)
    if axis:
        shape = builder.op("Gather", shape, builder.integers(order), axis=0)
    zeros = _zeros(builder, shape, node.inputs[2].dtype if node.inputs[2] else None)
    rows = builder.op("Unsqueeze", builder.cast(indices, ir.DataType.INT64), builder.integers([-1]))
    placed = builder.op("ScatterND", zeros, rows, dy, reduction="add")
    back = [int(place) for place in np.argsort(order)]
    return [builder.op("Transpose", placed, perm=back) if axis else placed]


def lower_gather_elements_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace GatherElementsGrad with ScatterElements.

    Each element of the output's gradient is added at the position from which the output element
    was gathered.
    """
    dy, shape, indices = take_inputs(node, 3)
    axis = node.attributes.get_int("axis", 0)
    zeros = _zeros(builder, shape, dy.dtype)
    return [builder.op("ScatterElements", zeros, indices, dy, axis=axis, reduction="add")]


def lower_gather_nd_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace GatherNDGrad with ScatterND.

    Each slice of the output's gradient is added at the position from which the output slice was
    gathered.
    """
    shape, indices, dy = take_inputs(node, 3)
    batch = node.attributes.get_int("batch_dims", 0)
    if batch:
        indices = _spell_batches(builder, indices, require_rank(node, indices), batch)
    zeros = _zeros(builder, shape, dy.dtype)
    return [builder.op("ScatterND", zeros, indices, dy, reduction="add")]


def _spell_batches(builder: NodeBuilder, indices: ir.Value, rank: int, batch: int) -> ir.Value:
    """Prefix each index with its own position along the batch axes."""
    front = builder.op("Shape", indices, start=0, end=rank - 1)
    span = builder.op("Concat", front, builder.integers([1]), axis=0)
    places = []
    for axis in range(batch):
        extent = builder.op("Squeeze", builder.shape(indices, axis, axis + 1))
        count = builder.op("Range", builder.integer(0), extent, builder.integer(1))
        others = builder.integers([a for a in range(rank) if a != axis])
        places.append(builder.op("Expand", builder.op("Unsqueeze", count, others), span))
    return builder.op("Concat", *places, builder.cast(indices, ir.DataType.INT64), axis=-1)


def lower_trilu(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace ONNX Runtime's own Trilu with the standard operator of the same name and meaning."""
    upper = node.attributes.get_int("upper", 1)
    return [builder.op("Trilu", *node.inputs, upper=upper)]


def lower_matmul(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace FusedMatMul, which computes alpha * A @ B, with Transpose, MatMul and Mul.

    Before the product, the axes of A are permuted as the attributes require: ``transBatchA`` moves
    the first axis behind the other batch axes, and ``transA`` then swaps the last two axes.  The
    corresponding attributes apply to B.
    """
    a, b = take_inputs(node, 2)

    def turn(value: ir.Value, side: str) -> ir.Value:
        rank = require_rank(node, value)
        order = [*range(rank)]
        if rank < 2:
            return value
        if node.attributes.get_int(f"transBatch{side}", 0):
            order = [*order[1:-1], order[0], order[-1]]
        if node.attributes.get_int(f"trans{side}", 0):
            order[-2:] = order[:-3:-1]
        return value if order == [*range(rank)] else builder.op("Transpose", value, perm=order)

    dtype = a.dtype
    product = builder.op("MatMul", turn(a, "A"), turn(b, "B"))
    alpha = node.attributes.get_float("alpha", 1.0)
    return [product if alpha == 1.0 else builder.op("Mul", product, builder.number(alpha, dtype))]


def lower_div_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace DivGrad, the gradient of a / b, with its formulas.

    The formulas are da = dy / b and db = -dy * a / b**2, where dy is the gradient of the output.
    If a or b was broadcast, its gradient is summed over the broadcast axes.
    """
    dy, a, b = take_inputs(node, 3)
    da = builder.op("Div", dy, b)
    db = builder.op("Neg", builder.op("Mul", da, builder.op("Div", a, b)))
    return [_sum_stretched(builder, da, a, b), _sum_stretched(builder, db, b, a)]


def _sum_stretched(
    builder: NodeBuilder, value: ir.Value, own: ir.Value, other: ir.Value
) -> ir.Value:
    """Sum a gradient over the axes along which ``own`` was broadcast to the shape of ``other``."""
    dims = known_dims(own)
    if dims is not None and None not in dims and dims == known_dims(other):
        return value
    shape = builder.shape(own)
    axes = _find_stretched(builder, shape, builder.shape(other))
    total = builder.op("ReduceSum", value, axes, keepdims=1, noop_with_empty_axes=1)
    return builder.op("Reshape", total, shape)


def lower_broadcast_axes(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace BroadcastGradientArgs with standard operators.

    BroadcastGradientArgs takes two shapes.  For each of them, it computes the axes that are
    broadcast when the two shapes are combined.
    """
    left, right = take_inputs(node, 2)
    return [_find_stretched(builder, left, right), _find_stretched(builder, right, left)]


def _find_stretched(builder: NodeBuilder, own: ir.Value, other: ir.Value) -> ir.Value:
    one = builder.integers([1])
    lengths = [builder.op("Shape", shape) for shape in (own, other)]
    longest = builder.op("Max", *lengths)

    def align(shape: ir.Value, length: ir.Value) -> ir.Value:
        missing = builder.op("Sub", longest, length)
        return builder.op("Concat", builder.op("Expand", one, missing), shape, axis=0)

    mine, theirs = (align(s, n) for s, n in zip((own, other), lengths, strict=True))
    single = builder.op("Equal", mine, one)
    stretched = builder.op("And", single, builder.op("Not", builder.op("Equal", theirs, one)))
    return builder.op("Reshape", builder.op("NonZero", stretched), builder.integers([-1]))
