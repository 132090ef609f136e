"""Operators newer than opset 21, written in operators of opset 21.

:data:`DOWNGRADES` maps an operator to a function from a node to the values that replace its
outputs, or ``None`` where the node can stay as it is.  Operators that onnx defines by a function
body are not part of it: :mod:`opsets` expands them.  Source: onnx.defs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.accumulations import Line, accumulate
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims, known_rank
from splitonnx.partitioner.normalization.upgrades import refuse

Adapter = Callable[[NodeBuilder, ir.Node], Sequence[ir.Value | None] | None]

_ADVICE = "export the model without it"


def _multiply_up(draft: NodeBuilder, node: ir.Node) -> Sequence[ir.Value]:
    """CumProd by shifts; for an unknown length the product over j of x[j] where j <= i, else 1."""
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
        return [accumulate(draft, "Mul", x, line, exclusive=exclusive)]
    size = draft.op("Squeeze", draft.op("Shape", x, start=along, end=along + 1))
    steps = draft.op("Range", draft.integer(0), size, draft.integer(1))
    behind = list(range(1, rank - along))
    to = draft.op("Unsqueeze", steps, draft.integers([1, *[1 + axis for axis in behind]]))
    each = draft.op("Unsqueeze", steps, draft.integers([0, *[1 + axis for axis in behind]]))
    kind = ("Greater" if reverse else "Less") + ("" if exclusive else "OrEqual")
    table = draft.op("Unsqueeze", x, draft.integers([along]))  # (..., 1, n, ...)
    kept = draft.op("Where", draft.op(kind, each, to), table, draft.number(1, x.dtype))
    return [draft.op("ReduceProd", kept, draft.integers([along + 1]), keepdims=0)]


def _scatter_rows(draft: NodeBuilder, node: ir.Node) -> Sequence[ir.Value]:
    """TensorScatter: ``update`` written into the cache from each sample's own index on."""
    cache, update = node.inputs[:2]
    starts = node.inputs[2] if len(node.inputs) > 2 else None
    assert cache is not None
    assert update is not None
    rank = known_rank(cache)
    if rank is None:
        raise refuse(node, "the rank of its cache is not known", _ADVICE)
    axis = node.attributes.get_int("axis", -2) % rank
    size = draft.op("Squeeze", draft.op("Shape", update, start=axis, end=axis + 1))
    places = draft.op("Range", draft.integer(0), size, draft.integer(1))
    behind = list(range(1, rank - axis))
    if behind:
        places = draft.op("Unsqueeze", places, draft.integers(behind))
    if starts is not None:
        first = draft.op("Unsqueeze", starts, draft.integers(range(1, rank)))  # (B, 1, ...)
        places = draft.op("Add", places, first)
    if node.attributes.get_string("mode", "linear") == "circular":
        places = draft.op("Mod", places, draft.op("Shape", cache, start=axis, end=axis + 1))
    places = draft.op("Expand", places, draft.op("Shape", update))
    return [draft.op("ScatterElements", cache, places, update, axis=axis)]


def _divide_rest(draft: NodeBuilder, node: ir.Node) -> Sequence[ir.Value] | None:
    """Mod with fmod=0 takes floats since opset 28: A - floor(A / B) * B."""
    a, b = node.inputs
    assert a is not None
    if node.attributes.get_int("fmod", 0) or a.dtype is None or not a.dtype.is_floating_point():
        return None
    quotient = draft.op("Floor", draft.op("Div", a, b))
    return [draft.op("Sub", a, draft.op("Mul", quotient, b))]


def _unfold_space(draft: NodeBuilder, node: ir.Node) -> Sequence[ir.Value] | None:
    """SpaceToDepth in the order column, row, depth."""
    x, size = node.inputs[0], node.attributes["blocksize"].as_int()
    mode = node.attributes.pop("mode", None)
    if mode is None or mode.as_string() == "DCR":
        return None
    n, c = (draft.op("Shape", x, start=i, end=i + 1) for i in (0, 1))
    h, w = (
        draft.op("Div", draft.op("Shape", x, start=i, end=i + 1), draft.integers([size]))
        for i in (2, 3)
    )
    block = draft.integers([size])
    blocks = draft.op("Reshape", x, draft.op("Concat", n, c, h, block, w, block, axis=0))
    turned = draft.op("Transpose", blocks, perm=[0, 1, 3, 5, 2, 4])
    depth = draft.op("Mul", c, draft.integers([size * size]))
    return [draft.op("Reshape", turned, draft.op("Concat", n, depth, h, w, axis=0))]


def _drop_rounding(draft: NodeBuilder, node: ir.Node) -> None:
    """The rounding mode concerns float8e8m0 alone, a type that opset 21 has not."""
    node.attributes.pop("round_mode", None)


def _drop_stash(draft: NodeBuilder, node: ir.Node) -> None:
    """Range in 16 bits is computed in float32 either way (opset 21 has none in 16 bits)."""
    node.attributes.pop("stash_type", None)


def _cast_dequantized(draft: NodeBuilder, node: ir.Node) -> Sequence[ir.Value] | None:
    """The type of the result may differ from the scale's since opset 23."""
    wanted = node.attributes.pop("output_dtype", None)
    scale = node.inputs[1]
    assert scale is not None
    if wanted is None or not wanted.as_int() or scale.dtype == ir.DataType(wanted.as_int()):
        return None
    dtype = ir.DataType(wanted.as_int())
    inputs = [node.inputs[0], draft.cast(scale, dtype), *node.inputs[2:]]
    return draft.ops("DequantizeLinear", inputs, 1, dict(node.attributes))


def _cast_quantized(draft: NodeBuilder, node: ir.Node) -> Sequence[ir.Value] | None:
    """The division may be more precise than input and scale since opset 23, which may differ."""
    x, scale = node.inputs[:2]
    assert x is not None
    assert scale is not None
    wanted = node.attributes.pop("precision", None)
    dtype = ir.DataType(wanted.as_int()) if wanted is not None and wanted.as_int() else scale.dtype
    if dtype is None or (x.dtype == dtype and scale.dtype == dtype):
        return None
    inputs = [draft.cast(x, dtype), draft.cast(scale, dtype), *node.inputs[2:]]
    return draft.ops("QuantizeLinear", inputs, 1, dict(node.attributes))


def _refuse_signed_shift(draft: NodeBuilder, node: ir.Node) -> None:
    value = node.inputs[0]
    if value is not None and value.dtype is not None and value.dtype.is_signed():
        raise refuse(node, "it shifts signed integers, which opset 21 does not", _ADVICE)


DOWNGRADES: Mapping[str, Adapter] = {
    "BitShift": _refuse_signed_shift,
    "Cast": _drop_rounding,
    "CastLike": _drop_rounding,
    "CumProd": _multiply_up,
    "DequantizeLinear": _cast_dequantized,
    "Mod": _divide_rest,
    "QuantizeLinear": _cast_quantized,
    "Range": _drop_stash,
    "SpaceToDepth": _unfold_space,
    "TensorScatter": _scatter_rows,
}
"""Operator -> how to write what opset 22 and later gave it in operators of opset 21."""
