"""Layer normalizations, alone or fused with the addition or the tables before them."""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, take_input, take_inputs
from splitonnx.partitioner.normalization.fused.operands import (
    find_dtype,
    find_rank,
    refuse,
    refuse_outputs,
    take_optional,
)

_SMALL = 1e-12
"""The default of epsilon in the operators that add first."""


def write_layer_norm(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Write ONNX's own LayerNormalization, whose definition is the same."""
    kept = {name: value for name, value in node.attributes.items() if name != "stash_type"}
    return list(builder.ops("LayerNormalization", list(node.inputs), len(node.outputs), kept))


def write_simplified(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Compute ``x / sqrt(mean(x^2) + epsilon) * scale`` over the axes from ``axis`` on."""
    x, scale = take_inputs(node, 2)
    axis, epsilon = (
        node.attributes.get_int("axis", -1),
        node.attributes.get_float("epsilon", 1e-5),
    )
    stop = 0 if axis < 0 else find_rank(x)
    return list(_normalize(builder, x, scale, range(axis, stop), epsilon))


def write_skip(builder: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    """Normalize ``input + skip + bias``; the last output is the sum."""
    refuse_outputs(node, 0, 3)
    x, skip, scale = take_inputs(node, 3)
    total = _add(builder, x, skip, take_optional(node, 4))
    epsilon = node.attributes.get_float("epsilon", _SMALL)
    inputs = [total, scale, take_optional(node, 3)]
    made = builder.ops("LayerNormalization", inputs, 1, {"axis": -1, "epsilon": epsilon})
    return [made[0], None, None, total]


def write_skip_simplified(builder: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    """Normalize ``input + skip`` without a mean; the last output is the sum.

    ONNX Runtime 1.19's kernel for processors ignores the bias that may be added as well, so what
    the model means with one depends on where it runs.
    """
    refuse_outputs(node, 0, 3)
    if take_optional(node, 3) is not None:
        raise refuse(node, "it has a bias, which some kernels of ONNX Runtime ignore")
    x, skip, scale = take_inputs(node, 3)
    total = _add(builder, x, skip)
    epsilon = node.attributes.get_float("epsilon", _SMALL)
    made, _ = _normalize(builder, total, scale, [-1], epsilon)
    return [made, None, None, total]


def write_embedding(builder: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    """Add the embeddings of words, positions and segments, and normalize the sum.

    The second output counts the tokens that the mask keeps, and the third is the sum.
    """
    words, segments = take_input(node), take_optional(node, 1)
    table, positions = take_input(node, 2), take_input(node, 3)
    parts = [builder.op("Gather", table, words)]
    places = take_optional(node, 8)
    if places is None:
        length = builder.op("Squeeze", builder.op("Shape", words, start=1, end=2))
        places = builder.op("Range", builder.integer(0), length, builder.integer(1))
    parts.append(builder.op("Gather", positions, places))
    if segments is not None:
        parts.append(builder.op("Gather", take_input(node, 4), segments))
    total = _add(builder, *parts)
    scale, shift = take_input(node, 5), take_input(node, 6)
    epsilon = node.attributes.get_float("epsilon", _SMALL)
    made = builder.ops(
        "LayerNormalization", [total, scale, shift], 1, {"axis": -1, "epsilon": epsilon}
    )
    return [made[0], _count_tokens(builder, words, take_optional(node, 7)), total]


def _count_tokens(builder: NodeBuilder, words: ir.Value, mask: ir.Value | None) -> ir.Value:
    """Count the tokens of each sample that the mask keeps; without a mask the count is 0."""
    if mask is None:
        kept = builder.op("Equal", words, builder.op("Add", words, _one(builder, words)))
    else:
        kept = builder.op("Equal", mask, _one(builder, mask))
    numbers = builder.op("Cast", kept, to=ir.DataType.INT32.value)
    return builder.op("ReduceSum", numbers, builder.integers([1]), keepdims=0)


def _one(builder: NodeBuilder, like: ir.Value) -> ir.Value:
    return builder.number(1, find_dtype(like))


def _add(builder: NodeBuilder, *values: ir.Value | None) -> ir.Value:
    first, *others = [value for value in values if value is not None]
    for value in others:
        first = builder.op("Add", first, value)
    return first


def _normalize(
    builder: NodeBuilder, x: ir.Value, scale: ir.Value, axes: range | list[int], epsilon: float
) -> tuple[ir.Value, ir.Value]:
    """Return the normalized value, and the inverse of the root of the mean square."""
    dtype = find_dtype(scale)
    square = builder.op("ReduceMean", builder.op("Mul", x, x), builder.integers(axes), keepdims=1)
    root = builder.op("Sqrt", builder.op("Add", square, builder.number(epsilon, dtype)))
    inverse = builder.op("Div", builder.number(1.0, dtype), root)
    return builder.op("Mul", builder.op("Div", x, root), scale), inverse
