"""Rewrite reductions along axes, and CumSum, so that they can be differentiated.

The axes may be computed in the graph, except those of ReduceProd and CumSum.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.accumulations import Line, accumulate
from splitonnx.partitioner.graphs.builders import (
    NodeBuilder,
    known_array,
    known_dims,
    known_rank,
    require_rank,
    take_input,
)
from splitonnx.partitioner.rewrites.steps import rewrite_step

Values = Sequence[ir.Value]


def _axes(node: ir.Node) -> ir.Value | None:
    return node.inputs[1] if len(node.inputs) > 1 else None


def _is_empty(x: ir.Value) -> bool:
    """Return whether a value has no elements; the gradient of a product fails for such values."""
    return 0 in (known_dims(x) or ())


def _keeps_dims(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("keepdims", 1))


def _reduce(
    builder: NodeBuilder, kind: str, node: ir.Node, x: ir.Value, keepdims: int | None = None
) -> ir.Value:
    """Reduce ``x`` with the operator ``kind``, and with the axes and attributes of ``node``."""
    kept = node.attributes.get_int("keepdims", 1) if keepdims is None else keepdims
    empty = node.attributes.get_int("noop_with_empty_axes", 0)
    axes = _axes(node)
    inputs = [x] if axes is None else [x, axes]
    return builder.op(kind, *inputs, keepdims=kept, noop_with_empty_axes=empty)


def rewrite_extreme(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite ReduceMax and ReduceMin so that all elements equal to the extreme share the gradient.

    The result is computed as the mean of all elements that equal the extreme.  onnxruntime-training
    has no gradient for these operators.

    Raises:
        UnsupportedModel: the input of ReduceMax has no elements.
    """
    x = take_input(node)
    if _is_empty(x) and node.op_type == "ReduceMax":
        raise UnsupportedModel(
            f"node '{node.name}' (ReduceMax)",
            f"'{x.name}' has no elements, for which ONNX Runtime has no kernel",
            "export the model without it",
        )
    if _is_empty(x):
        return rewrite_step(builder, node)
    point = builder.detach(x)
    zero, one = builder.number(0.0, x.dtype), builder.number(1.0, x.dtype)
    extreme = _reduce(builder, node.op_type, node, point, keepdims=1)
    # "beaten" instead of "equal", because NaN is not beaten and must appear in the result
    beaten = builder.op("Less" if node.op_type == "ReduceMax" else "Greater", point, extreme)
    count = _reduce(builder, "ReduceSum", node, builder.op("Where", beaten, zero, one), keepdims=1)
    shares = builder.op("Mul", x, builder.op("Reciprocal", count))
    return [_reduce(builder, "ReduceSum", node, builder.op("Where", beaten, zero, shares))]


def rewrite_l1(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite ReduceL1 as the sum of the absolute values.

    onnxruntime-training has no gradient for ReduceL1.
    """
    return [_reduce(builder, "ReduceSum", node, builder.op("Abs", take_input(node)))]


def rewrite_log_sum(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite ReduceLogSum as the logarithm of the sum.

    onnxruntime-training has no gradient for ReduceLogSum.
    """
    return [builder.op("Log", _reduce(builder, "ReduceSum", node, take_input(node)))]


def rewrite_sum_square(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite ReduceSumSquare as the sum of x * x.

    onnxruntime-training has no gradient for ReduceSumSquare.
    """
    x = take_input(node)
    if _is_empty(x):
        return rewrite_step(builder, node)
    return [_reduce(builder, "ReduceSum", node, builder.op("Mul", x, x))]


def rewrite_smooth(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite ReduceL2 and ReduceLogSumExp if they reduce a tensor to a scalar.

    If the node has no axes, the gradient builder of onnxruntime-training 1.19.2 cannot infer the
    type of the gradient.  If a ReduceL2 lists all axes, the gradient has one dimension too many.
    Therefore, the rewritten reduction keeps its dimensions, and a Reshape removes them afterwards.
    Other nodes are left unchanged.
    """
    if _keeps_dims(node) or (_axes(node) is not None and known_rank(node.outputs[0]) != 0):
        return None
    kept = _reduce(builder, node.op_type, node, take_input(node), keepdims=1)
    return [builder.op("Reshape", kept, builder.integers([]))]


def rewrite_product(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite ReduceProd with Mul nodes.

    Along each axis, the first half of the elements is repeatedly multiplied by the second half,
    until one element is left.  For an axis of unknown length, the derivative is attached explicitly
    instead (see :mod:`tangents`).  No divisions are needed, so zeros cause no errors.
    onnxruntime-training has no gradient for ReduceProd.
    """
    x = take_input(node)
    rank = require_rank(node, x)
    axes = _find_axes(node, rank)
    dims = known_dims(x) or [None] * rank
    dtype = x.dtype
    for axis in axes:
        length = dims[axis]
        if length is None:
            x = _multiply_unknown(builder, x, axis, rank, dtype)
        else:
            x = _multiply_halves(builder, x, Line(axis=axis, rank=rank, length=length), dtype)
    if _keeps_dims(node):
        return [x]
    return [builder.op("Squeeze", x, builder.integers(axes))]


def _multiply_halves(
    builder: NodeBuilder, x: ir.Value, line: Line, dtype: ir.DataType | None
) -> ir.Value:
    halvings = max(line.length - 1, 0).bit_length()
    missing = 2**halvings - line.length
    if missing:
        pads = [0] * (2 * line.rank)
        pads[line.rank + line.axis] = missing
        x = builder.op("Pad", x, builder.integers(pads), builder.number(1.0, dtype))
    for _ in range(halvings):
        halves = builder.ops("Split", [x], 2, {"axis": line.axis, "num_outputs": 2})
        x = builder.op("Mul", *halves)
    return x


def _multiply_unknown(
    builder: NodeBuilder, x: ir.Value, axis: int, rank: int, dtype: ir.DataType | None
) -> ir.Value:
    """Attach the derivative of a product: for each element, the product of the other elements.

    The other elements are the rows of a square matrix whose diagonal is set to one.
    """
    last = [*(a for a in range(rank) if a != axis), axis]
    point = builder.detach(x)
    row = builder.op("Unsqueeze", builder.op("Transpose", point, perm=last), builder.integers([-2]))
    places = builder.op(
        "Range",
        builder.integer(0),
        builder.op("Squeeze", builder.op("Shape", point, start=axis, end=axis + 1)),
        builder.integer(1),
    )
    own = builder.op("Equal", places, builder.op("Unsqueeze", places, builder.integers([1])))
    others = builder.op("Where", own, builder.number(1.0, dtype), row)  # (..., L, L)
    slope = builder.op("ReduceProd", others, builder.integers([-1]), keepdims=0)
    back = [last.index(a) for a in range(rank)]
    slope = builder.op("Transpose", slope, perm=back)
    along = builder.integers([axis])
    moved = builder.op("Mul", slope, builder.op("Sub", x, point))
    value = builder.op("ReduceProd", point, along, keepdims=1)
    return builder.op("Add", value, builder.op("ReduceSum", moved, along, keepdims=1))


def rewrite_running_sum(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite CumSum as a sum of shifted copies of the input.

    If the length of the axis is unknown, the input is multiplied by a triangular matrix of ones
    instead.  onnxruntime-training has no gradient for CumSum.
    """
    x = take_input(node)
    line = _find_line(node, x)
    exclusive = bool(node.attributes.get_int("exclusive", 0))
    if line.length >= 0:
        return [accumulate(builder, "Add", x, line, exclusive=exclusive)]
    return [_multiply_triangle(builder, x, line, exclusive)]


def _multiply_triangle(builder: NodeBuilder, x: ir.Value, line: Line, exclusive: bool) -> ir.Value:
    dtype = x.dtype
    places = builder.op(
        "Range",
        builder.integer(0),
        builder.op("Squeeze", builder.op("Shape", x, start=line.axis, end=line.axis + 1)),
        builder.integer(1),
    )
    column = builder.op("Unsqueeze", places, builder.integers([1]))
    kind = ("Greater" if line.reverse else "Less") + ("" if exclusive else "OrEqual")
    ones = builder.cast(builder.op(kind, column, places), dtype)  # (L, L), summands in a column
    swap = list(range(line.rank))
    swap[line.axis], swap[-1] = swap[-1], swap[line.axis]
    if line.axis == line.rank - 1:
        return builder.op("MatMul", x, ones)
    return builder.op(
        "Transpose", builder.op("MatMul", builder.op("Transpose", x, perm=swap), ones), perm=swap
    )


def _find_line(node: ir.Node, x: ir.Value) -> Line:
    """Read the axis of a running operator; its length is -1 if it is not known."""
    rank = require_rank(node, x)
    axis = known_array(node.inputs[1])
    if axis is None:
        raise _unknown_axes(node)
    place = int(axis.reshape(-1)[0]) % rank
    length = (known_dims(x) or [None] * rank)[place]
    return Line(
        axis=place,
        rank=rank,
        length=-1 if length is None else length,
        reverse=bool(node.attributes.get_int("reverse", 0)),
    )


def _find_axes(node: ir.Node, rank: int) -> list[int]:
    axes = _axes(node)
    array = None if axes is None else known_array(axes)
    if axes is not None and array is None:
        raise _unknown_axes(node)
    if array is not None and array.size:
        return sorted(int(axis) % rank for axis in array)
    return list(range(rank))


def _unknown_axes(node: ir.Node) -> UnsupportedModel:
    return UnsupportedModel(
        f"node '{node.name}' ({node.op_type})",
        "its axes are computed in the graph",
        "export the model with constant axes",
    )
