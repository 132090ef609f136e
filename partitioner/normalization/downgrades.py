"""Convert operators newer than opset 21 to operators of opset 21.

:data:`DOWNGRADES` maps an operator to a function that takes a node and returns replacements for its
outputs, or ``None`` if the node can stay unchanged.  Some newer operators are not listed, because
onnx defines them as functions of other operators, and :mod:`opsets` replaces them with these
definitions.  The formulas follow onnx.defs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.accumulations import Line, accumulate
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims, known_rank
from splitonnx.partitioner.normalization.upgrades import refuse

Adapter = Callable[[NodeBuilder, ir.Node], Sequence[ir.Value | None] | None]

_ADVICE = "export the model without it"


def _multiply_up(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value]:
    """Replace CumProd by products of shifted copies.

    If the length of the axis is unknown, element i is the product over all j of x[j] if j <= i,
    else 1.
    """
    x, axis = node.inputs
    assert x is not None
    assert axis is not None
    rank, place = known_rank(x), ir.convenience.get_const_tensor(axis)
    if rank is None or place is None or x.dtype is None:
        raise refuse(node, "its axis, or the rank of its input, is not known", _ADVICE)
    along = int(place.numpy().item()) % rank
    reverse = bool(node.attributes.get_int("reverse", 0))
    exclusive = bool(node.attributes.get_int("exclusive", 0))
    length = (known_dims(x) or [None] * rank)[along]
    if length is not None:
        line = Line(axis=along, rank=rank, length=length, reverse=reverse)
        return [accumulate(builder, "Mul", x, line, exclusive=exclusive)]
    size = builder.op("Squeeze", builder.op("Shape", x, start=along, end=along + 1))
    steps = builder.op("Range", builder.integer(0), size, builder.integer(1))
    behind = list(range(1, rank - along))
    to = builder.op("Unsqueeze", steps, builder.integers([1, *[1 + axis for axis in behind]]))
    each = builder.op("Unsqueeze", steps, builder.integers([0, *[1 + axis for axis in behind]]))
    kind = ("Greater" if reverse else "Less") + ("" if exclusive else "OrEqual")
    table = builder.op("Unsqueeze", x, builder.integers([along]))  # (..., 1, n, ...)
    kept = builder.op("Where", builder.op(kind, each, to), table, builder.number(1, x.dtype))
    return [builder.op("ReduceProd", kept, builder.integers([along + 1]), keepdims=0)]


def _scatter_rows(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value]:
    """Replace TensorScatter: write ``update`` into the cache from each sample's own index on."""
    cache, update = node.inputs[:2]
    starts = node.inputs[2] if len(node.inputs) > 2 else None
    assert cache is not None
    assert update is not None
    rank = known_rank(cache)
    if rank is None:
        raise refuse(node, "the rank of its cache is not known", _ADVICE)
    axis = node.attributes.get_int("axis", -2) % rank
    size = builder.op("Squeeze", builder.op("Shape", update, start=axis, end=axis + 1))
    places = builder.op("Range", builder.integer(0), size, builder.integer(1))
    behind = list(range(1, rank - axis))
    if behind:
        places = builder.op("Unsqueeze", places, builder.integers(behind))
    if starts is not None:
        first = builder.op("Unsqueeze", starts, builder.integers(range(1, rank)))  # (B, 1, ...)
        places = builder.op("Add", places, first)
    if node.attributes.get_string("mode", "linear") == "circular":
        places = builder.op("Mod", places, builder.op("Shape", cache, start=axis, end=axis + 1))
    places = builder.op("Expand", places, builder.op("Shape", update))
    return [builder.op("ScatterElements", cache, places, update, axis=axis)]


def _divide_rest(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value] | None:
    """Replace Mod of floats with fmod=0, which is new in opset 28, by A - floor(A / B) * B."""
    a, b = node.inputs
    assert a is not None
    if node.attributes.get_int("fmod", 0) or a.dtype is None or not a.dtype.is_floating_point():
        return None
    quotient = builder.op("Floor", builder.op("Div", a, b))
    return [builder.op("Sub", a, builder.op("Mul", quotient, b))]


def _unfold_space(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value] | None:
    """Replace SpaceToDepth in the mode CRD (column, row, depth) with Reshape and Transpose."""
    x, size = node.inputs[0], node.attributes["blocksize"].as_int()
    mode = node.attributes.pop("mode", None)
    if mode is None or mode.as_string() == "DCR":
        return None
    n, c = (builder.op("Shape", x, start=i, end=i + 1) for i in (0, 1))
    h, w = (
        builder.op("Div", builder.op("Shape", x, start=i, end=i + 1), builder.integers([size]))
        for i in (2, 3)
    )
    block = builder.integers([size])
    blocks = builder.op("Reshape", x, builder.op("Concat", n, c, h, block, w, block, axis=0))
    turned = builder.op("Transpose", blocks, perm=[0, 1, 3, 5, 2, 4])
    depth = builder.op("Mul", c, builder.integers([size * size]))
    return [builder.op("Reshape", turned, builder.op("Concat", n, depth, h, w, axis=0))]


def _remove_rounding(builder: NodeBuilder, node: ir.Node) -> None:
    """Drop the rounding mode, which only affects float8e8m0, a type that opset 21 does not have."""
    node.attributes.pop("round_mode", None)


def _remove_stash(builder: NodeBuilder, node: ir.Node) -> None:
    """Drop the type in which Range computes 16-bit floats; they are computed in float32 anyway."""
    node.attributes.pop("stash_type", None)


def _cast_dequantized(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value] | None:
    """Cast the scale if the result has another type, which is possible since opset 23."""
    wanted = node.attributes.pop("output_dtype", None)
    scale = node.inputs[1]
    assert scale is not None
    if wanted is None or not wanted.as_int() or scale.dtype == ir.DataType(wanted.as_int()):
        return None
    dtype = ir.DataType(wanted.as_int())
    inputs = [node.inputs[0], builder.cast(scale, dtype), *node.inputs[2:]]
    return builder.ops("DequantizeLinear", inputs, 1, dict(node.attributes))


def _cast_quantized(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value] | None:
    """Cast input and scale to the type of the division, which may differ since opset 23."""
    x, scale = node.inputs[:2]
    assert x is not None
    assert scale is not None
    wanted = node.attributes.pop("precision", None)
    dtype = ir.DataType(wanted.as_int()) if wanted is not None and wanted.as_int() else scale.dtype
    if dtype is None or (x.dtype == dtype and scale.dtype == dtype):
        return None
    inputs = [builder.cast(x, dtype), builder.cast(scale, dtype), *node.inputs[2:]]
    return builder.ops("QuantizeLinear", inputs, 1, dict(node.attributes))


def _refuse_signed_shift(builder: NodeBuilder, node: ir.Node) -> None:
    value = node.inputs[0]
    if value is not None and value.dtype is not None and value.dtype.is_signed():
        raise refuse(node, "it shifts signed integers, which opset 21 does not", _ADVICE)


DOWNGRADES: Mapping[str, Adapter] = {
    "BitShift": _refuse_signed_shift,
    "Cast": _remove_rounding,
    "CastLike": _remove_rounding,
    "CumProd": _multiply_up,
    "DequantizeLinear": _cast_dequantized,
    "Mod": _divide_rest,
    "QuantizeLinear": _cast_quantized,
    "Range": _remove_stash,
    "SpaceToDepth": _unfold_space,
    "TensorScatter": _scatter_rows,
}
"""Maps an operator to the function that converts a node of opset 22 or later to opset 21."""
