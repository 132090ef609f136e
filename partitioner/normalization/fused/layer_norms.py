"""Formulas for layer normalizations, alone or fused with additions or embeddings before them."""

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
"""The default epsilon of the operators that add their inputs before they normalize."""


def write_layer_norm(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Replace ``node`` with the LayerNormalization of ONNX, which has the same definition."""
    kept = {name: value for name, value in node.attributes.items() if name != "stash_type"}
    return list(builder.ops("LayerNormalization", list(node.inputs), len(node.outputs), kept))


def write_simplified(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Compute ``x / rms * scale``, where ``rms`` is ``sqrt(mean(x^2) + epsilon)``.

    The mean is over all axes from the attribute ``axis`` to the last.  The second output is
    ``1 / rms``.
    """
    x, scale = take_inputs(node, 2)
    axis, epsilon = (
        node.attributes.get_int("axis", -1),
        node.attributes.get_float("epsilon", 1e-5),
    )
    stop = 0 if axis < 0 else find_rank(x)
    return list(_normalize(builder, x, scale, range(axis, stop), epsilon))


def write_skip(builder: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    """Apply layer normalization to ``input + skip + bias``; the node's last output is the sum."""
    refuse_outputs(node, 0, 3)
    x, skip, scale = take_inputs(node, 3)
    total = _add(builder, x, skip, take_optional(node, 4))
    epsilon = node.attributes.get_float("epsilon", _SMALL)
    inputs = [total, scale, take_optional(node, 3)]
    made = builder.ops("LayerNormalization", inputs, 1, {"axis": -1, "epsilon": epsilon})
    return [made[0], None, None, total]


def write_skip_simplified(builder: NodeBuilder, node: ir.Node) -> list[ir.Value | None]:
    """Divide ``input + skip`` by its root mean square, and multiply the result by the scale.

    The node's last output is the sum ``input + skip``.

    A node with a bias is refused.  The CPU kernel of ONNX Runtime 1.19 ignores the bias, so the
    result of such a node depends on where the model runs.
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

    The outputs are the normalized sum, the number of tokens that the mask keeps in each sample (0
    if there is no mask), and the sum before normalization.
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
    """Count the tokens that the mask keeps in each sample; without a mask, the count is 0."""
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
    """Return ``x`` divided by its root mean square and scaled, and the inverse of this root."""
    dtype = find_dtype(scale)
    square = builder.op("ReduceMean", builder.op("Mul", x, x), builder.integers(axes), keepdims=1)
    root = builder.op("Sqrt", builder.op("Add", square, builder.number(epsilon, dtype)))
    inverse = builder.op("Div", builder.number(1.0, dtype), root)
    return builder.op("Mul", builder.op("Div", x, root), scale), inverse
