"""Formulas for fused attention operators and rotary embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.gate.fused_operators import WITHOUT
from splitonnx.partitioner.graphs.assertions import either, refuse_where
from splitonnx.partitioner.graphs.builders import NodeBuilder, take_input, take_inputs
from splitonnx.partitioner.normalization.fused.operands import (
    find_dtype,
    find_rank,
    find_size,
    refuse,
    refuse_inputs,
    refuse_outputs,
    take_optional,
)

_HEADS_FIRST = [0, 2, 1, 3]
_WITHOUT_HEADS = (
    "optimize it without use_multi_head_attention, if that was set: Attention is taken with a mask"
)
"""The advice on an operator that optimize_model of onnxruntime.transformers writes if asked to."""

_COUNTS = "mask_index_must_have_batch_or_2_batch_or_3_batch_plus_2_numbers"
"""End of the name of the node that fails over the size of a mask."""


@dataclass(frozen=True, kw_only=True)
class _Operands:
    """Queries, keys and values of shape ``[batch, heads, length, size]``, and the element type."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    dtype: ir.DataType
    size: int


def write_attention(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Project the input to queries, keys and values, and compute the attention."""
    refuse_outputs(node, 0)
    if take_optional(node, 4) is not None:
        raise refuse(node, "it continues from past keys and values")
    refuse_inputs(node, 6)
    if node.attributes.get_int("do_rotary", 0):
        raise refuse(node, "it rotates its operands")
    x, weights = take_inputs(node, 2)
    heads, dtype = _count_heads(node), find_dtype(weights)
    given = node.attributes.get("qkv_hidden_sizes")
    width = find_size(weights, 1)
    sizes = [width // 3] * 3 if given is None else list(given.as_ints())
    if sum(sizes) != width or len(sizes) != 3 or sizes[0] % heads or sizes[2] % heads:
        raise refuse(node, f"{heads} heads do not divide its weights of {width} columns")
    made = builder.op("MatMul", x, weights)
    if (bias := take_optional(node, 2)) is not None:
        made = builder.op("Add", made, bias)
    parts = [
        _split_heads(builder, part, heads)
        for part in builder.ops("Split", [made, builder.integers(sizes)], 3, {"axis": -1})
    ]
    operands = _Operands(
        query=parts[0], key=parts[1], value=parts[2], dtype=dtype, size=sizes[0] // heads
    )
    return [_attend(builder, node, operands, take_optional(node, 3), take_optional(node, 5))]


def write_multi_head(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Compute the attention of queries, keys and values that are separate inputs.

    A node with a mask is refused.  The CPU kernel of ONNX Runtime 1.19 ignores the mask, so the
    result of such a node depends on where the model runs.
    """
    refuse_outputs(node, 0)
    refuse_inputs(node, 6)
    if take_optional(node, 4) is not None:
        reason = "it has a mask, which some kernels of ONNX Runtime ignore"
        raise refuse(node, reason, f"{_WITHOUT_HEADS}; or {WITHOUT}")
    query, key, value = take_input(node), take_optional(node, 1), take_optional(node, 2)
    if key is None or value is None or find_rank(query) != 3:
        raise refuse(node, "its queries, keys and values are packed into one input")
    heads, bias = _count_heads(node), take_optional(node, 3)
    width, dtype = find_size(query, 2), find_dtype(query)
    parts: list[ir.Value] = [query, key, value]
    if bias is not None:
        total = find_size(bias, 0)
        sizes = builder.integers([width, width, total - 2 * width])
        shifts = builder.ops("Split", [bias, sizes], 3, {"axis": 0})
        if find_rank(key) == 4:
            raise refuse(node, "it adds a bias to keys that are split into heads already")
        parts = [builder.op("Add", p, s) for p, s in zip(parts, shifts, strict=True)]
    split = [
        _split_heads(builder, part, heads) if find_rank(given) == 3 else part
        for part, given in zip(parts, (query, key, value), strict=True)
    ]
    operands = _Operands(
        query=split[0], key=split[1], value=split[2], dtype=dtype, size=width // heads
    )
    return [_attend(builder, node, operands, None, take_optional(node, 5))]


def _count_heads(node: ir.Node) -> int:
    heads = node.attributes.get_int("num_heads", 0)
    if heads < 1:
        raise refuse(node, f"it has {heads} heads")
    return heads


def _split_heads(builder: NodeBuilder, value: ir.Value, heads: int) -> ir.Value:
    split = builder.op("Reshape", value, builder.integers([0, 0, heads, -1]))
    return builder.op("Transpose", split, perm=_HEADS_FIRST)


def _attend(
    builder: NodeBuilder,
    node: ir.Node,
    operands: _Operands,
    mask: ir.Value | None,
    shift: ir.Value | None,
) -> ir.Value:
    """Compute ``softmax(scale * Q @ K^T + shift + mask) @ V``, and join the heads.

    ``mask_filter_value`` is added to the score of each position that the mask excludes.  If
    ``unidirectional`` is set, the scores of positions after the query's own are replaced with the
    lowest finite number.
    """
    dtype = operands.dtype
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(operands.size)
    turned = builder.op("Transpose", operands.key, perm=[0, 1, 3, 2])
    scores = builder.op("MatMul", operands.query, turned)
    scores = builder.op("Mul", scores, builder.number(scale, dtype))
    if shift is not None:
        scores = builder.op("Add", scores, shift)
    if mask is not None:
        kept = _spread_mask(builder, node, mask, operands.key)
        added = node.attributes.get_float("mask_filter_value", -10000.0)
        scores = builder.op("Add", scores, _choose(builder, kept, added, dtype))
    if node.attributes.get_int("unidirectional", 0):
        rows = builder.op("Unsqueeze", _count(builder, operands.query), builder.integers([1]))
        earlier = builder.op("LessOrEqual", _count(builder, operands.key), rows)
        lowest = float(np.finfo(np.float16 if dtype.bitwidth == 16 else np.float32).min)
        scores = builder.op("Where", earlier, scores, builder.number(lowest, dtype))
    weights = builder.op("Softmax", scores, axis=-1)
    joined = builder.op(
        "Transpose", builder.op("MatMul", weights, operands.value), perm=[0, 2, 1, 3]
    )
    return builder.op("Reshape", joined, builder.integers([0, 0, -1]))


def _choose(builder: NodeBuilder, kept: ir.Value, added: float, dtype: ir.DataType) -> ir.Value:
    return builder.op("Where", kept, builder.number(0.0, dtype), builder.number(added, dtype))


def _count(builder: NodeBuilder, value: ir.Value) -> ir.Value:
    """Return the positions in ``[batch, heads, length, size]``, counted from 0."""
    length = builder.op("Squeeze", builder.op("Shape", value, start=2, end=3))
    return builder.op("Range", builder.integer(0), length, builder.integer(1))


def _spread_mask(builder: NodeBuilder, node: ir.Node, mask: ir.Value, key: ir.Value) -> ir.Value:
    """Return which positions a mask keeps, broadcastable to ``[batch, heads, query, key]``.

    A mask of rank 1 holds the length of each sample.  A mask of rank 2 or 3 holds a number for each
    position, and keeps the position if the number is greater than 0.
    """
    rank, zero = find_rank(mask), builder.number(0, find_dtype(mask))
    if rank == 1:
        ends, starts = _divide_mask(builder, node, mask)
        places = _count(builder, key)
        kept = builder.op("Less", places, _spread(builder, ends))
        if starts is None:
            return kept
        return builder.op("And", kept, builder.op("LessOrEqual", _spread(builder, starts), places))
    if rank not in (2, 3):
        raise refuse(node, f"its mask has {rank} dimensions")
    kept = builder.op("Greater", mask, zero)
    return builder.op("Unsqueeze", kept, builder.integers([1, 2] if rank == 2 else [1]))


def _spread(builder: NodeBuilder, numbers: ir.Value) -> ir.Value:
    """Return one number for each sample, as int64 of shape ``[batch, 1, 1, 1]``."""
    wide = builder.op("Cast", numbers, to=ir.DataType.INT64.value)
    return builder.op("Unsqueeze", wide, builder.integers([1, 2, 3]))


def _divide_mask(
    builder: NodeBuilder, node: ir.Node, mask: ir.Value
) -> tuple[ir.Value, ir.Value | None]:
    """Return where the kept positions of each sample end, and where they start (``None``: at 0).

    A mask of rank 1 holds one number for each sample, the end; or all ends, and then all starts; or
    all ends, and then sums of lengths, which ONNX Runtime's CPU kernel does not read.  If the sizes
    do not show which of these it is, the nodes decide it, and fail for any other size.
    """
    batch, count = _read_first(take_input(node)), _read_first(mask)
    if count is not None and count == batch:
        return mask, None
    if isinstance(batch, int) and isinstance(count, int):
        if count not in (2 * batch, 3 * batch + 2):
            reason = f"its mask of one dimension has {count} numbers for a batch of {batch}"
            raise refuse(node, f"{reason}, and not {batch}, {2 * batch} or {3 * batch + 2}")
        if count == 2 * batch:
            ends, starts = builder.ops("Split", [mask, builder.integers([batch] * 2)], 2, {})
            return ends, starts
        return builder.op("Slice", mask, builder.integers([0]), builder.integers([batch])), None
    rows = builder.op("Shape", take_input(node), start=0, end=1)
    size, twice = builder.op("Shape", mask), builder.op("Mul", rows, builder.integers([2]))
    most = builder.op("Add", builder.op("Add", twice, rows), builder.integers([2]))
    has_starts = builder.op("Equal", size, twice)
    is_right = either(
        builder, builder.op("Equal", size, rows), has_starts, builder.op("Equal", size, most)
    )
    zero = refuse_where(builder, builder.op("Not", is_right))
    refusing = zero.producer()
    assert refusing is not None
    refusing.name = f"{node.name or node.outputs[0].name}/{_COUNTS}"
    ends = builder.op("Slice", mask, builder.integers([0]), builder.op("Add", rows, zero))
    last = builder.op("Slice", mask, builder.op("Sub", size, rows), size)
    dtype = find_dtype(mask)
    return ends, builder.op("Mul", last, builder.op("Cast", has_starts, to=dtype.value))


def _read_first(value: ir.Value) -> int | str | None:
    """Return the size of a value's first dimension, or its name; ``None`` if it has neither."""
    dim = value.shape[0] if value.shape is not None and len(value.shape) else None
    return dim.value if isinstance(dim, ir.SymbolicDim) else dim


def write_rotary(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Rotate pairs of elements by angles that depend on the position of their token.

    The cosines and sines of the angles are read from two tables, which are inputs of the node.
    """
    x, places, cosines, sines = take_inputs(node, 4)
    half, rank = find_size(cosines, 1), find_rank(x)
    size = 2 * half
    if node.attributes.get_int("rotary_embedding_dim", 0) not in (0, size):
        raise refuse(node, "it rotates a part of each head")
    if node.attributes.get_int("is_packed_batching", 0):
        raise refuse(node, "its samples are packed")
    if node.attributes.get_float("scale", 1.0) != 1.0:
        raise refuse(node, "it scales its positions")
    if rank == 4:
        split = builder.op("Transpose", x, perm=_HEADS_FIRST)
    else:
        split = builder.op("Reshape", x, builder.integers([0, 0, -1, size]))
    positions = places
    if find_rank(places) == 1:  # the position of the first token
        length = builder.op("Squeeze", builder.op("Shape", split, start=1, end=2))
        counted = builder.op("Range", builder.integer(0), length, builder.integer(1))
        positions = builder.op(
            "Unsqueeze", builder.op("Add", counted, places), builder.integers([0])
        )
    cosine, sine = (
        builder.op("Unsqueeze", builder.op("Gather", table, positions), builder.integers([2]))
        for table in (cosines, sines)
    )
    turned = _rotate(builder, node, split, (cosine, sine), half)
    if rank == 4:
        return [builder.op("Transpose", turned, perm=_HEADS_FIRST)]
    return [builder.op("Reshape", turned, builder.integers([0, 0, -1]))]


def _rotate(
    builder: NodeBuilder,
    node: ir.Node,
    split: ir.Value,
    angles: tuple[ir.Value, ir.Value],
    half: int,
) -> ir.Value:
    """Rotate the pairs in ``[batch, length, heads, size]``: neighbours, or ``half`` apart."""
    cosine, sine = angles
    if is_interleaved := node.attributes.get_int("interleaved", 0):
        pairs = builder.op("Reshape", split, builder.integers([0, 0, 0, half, 2]))
        sizes, axis = builder.integers([1, 1]), -1
        first, second = (
            builder.op("Squeeze", part, builder.integers([-1]))
            for part in builder.ops("Split", [pairs, sizes], 2, {"axis": axis})
        )
    else:
        sizes = builder.integers([half, half])
        first, second = builder.ops("Split", [split, sizes], 2, {"axis": -1})
    real = builder.op("Sub", builder.op("Mul", first, cosine), builder.op("Mul", second, sine))
    other = builder.op("Add", builder.op("Mul", second, cosine), builder.op("Mul", first, sine))
    if not is_interleaved:
        return builder.op("Concat", real, other, axis=-1)
    last = builder.integers([-1])
    joined = builder.op(
        "Concat", builder.op("Unsqueeze", real, last), builder.op("Unsqueeze", other, last), axis=-1
    )
    return builder.op("Reshape", joined, builder.integers([0, 0, 0, 2 * half]))
