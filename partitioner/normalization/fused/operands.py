"""Read the types and shapes of a fused node's inputs, and refuse unsupported inputs and outputs."""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.gate.fused_operators import WITHOUT
from splitonnx.partitioner.graphs.builders import known_rank

MOST_STEPS = 1000
"""The largest number of nodes that are searched, backwards, for the element type of a value."""


class NotYet(Exception):
    """Raised if a formula needs a type or shape that is not known yet; the message names it."""


def take_optional(node: ir.Node, index: int) -> ir.Value | None:
    """Return the input of a node at ``index``, or ``None`` if it is omitted."""
    return node.inputs[index] if index < len(node.inputs) else None


def find_dtype(value: ir.Value | None) -> ir.DataType:
    """Return the element type of a value, inferred from the nodes before it if necessary.

    Raises:
        NotYet: the type cannot be inferred.
    """
    start = value
    for _ in range(MOST_STEPS):
        if value is None:
            break
        if value.dtype is not None:
            return value.dtype
        node = value.producer()
        if node is None:
            break
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        value = node.inputs[1 if node.op_type == "Where" else 0] if node.inputs else None
    raise NotYet(f"the element type of '{start.name if start else ''}'")


def find_rank(value: ir.Value) -> int:
    """Return a value's number of dimensions.

    Raises:
        NotYet: the number of dimensions is not known.
    """
    rank = known_rank(value)
    if rank is None:
        raise NotYet(f"the rank of '{value.name}'")
    return rank


def find_size(value: ir.Value, axis: int) -> int:
    """Return the size of a value along ``axis``.

    Raises:
        NotYet: the size is not known.
    """
    dim = None if value.shape is None else value.shape[axis]
    if not isinstance(dim, int):
        raise NotYet(f"dimension {axis} of '{value.name}'")
    return dim


def refuse(node: ir.Node, reason: str, advice: str = WITHOUT) -> UnsupportedModel:
    """Return an error for a fused node that cannot be written in standard operators.

    ``reason`` states what prevents this, and ``advice`` what to do.
    """
    return UnsupportedModel(
        f"node '{node.name}' ({node.op_type})",
        f"{reason}; it is an operator of ONNX Runtime, so this is an optimized model",
        advice,
    )


def refuse_inputs(node: ir.Node, first: int) -> None:
    """Check that a node has no input at index ``first`` or after it.

    Raises:
        UnsupportedModel: the node has such an input.
    """
    for index, value in enumerate(node.inputs[first:], first):
        if value is not None:
            raise refuse(node, f"its input {index} ('{value.name}') cannot be written out")


def refuse_outputs(node: ir.Node, *kept: int) -> None:
    """Check that no outputs of a node are used except those at the indices in ``kept``.

    Raises:
        UnsupportedModel: another output is used.
    """
    for index, value in enumerate(node.outputs):
        if index not in kept and (value.uses() or value.is_graph_output()):
            raise refuse(node, f"its output {index} ('{value.name}') cannot be written out")
