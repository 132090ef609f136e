"""Compute with extents, the sizes of a tensor's dimensions.

An extent is a number if the size is known.  Otherwise, it is a value that the graph computes.
Rewrites that use extents keep every dynamic dimension of the model dynamic.  This module contains
only arithmetic on shapes; nothing in it is specific to one operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, known_dims, known_rank
from splitonnx.partitioner.inference.inferences import Inference
from splitonnx.partitioner.inference.undecided_sizes import (
    list_open_sizes,
    list_settings,
    name_settings,
    name_sizes,
)

Extent = int | ir.Value
"""A number, or an int64 vector of one element that the graph computes."""


def require_rank(node: ir.Node, value: ir.Value) -> int:
    """Return the number of dimensions of a value.

    Raises:
        UnsupportedModel: the number of dimensions is unknown.
    """
    rank = known_rank(value)
    if rank is None:
        raise refuse(node, f"the rank of '{value.name}' is not known", "export it with its rank")
    return rank


def require_sizes(node: ir.Node, value: ir.Value, start: int = 0) -> list[int]:
    """Return the sizes of a value's dimensions from dimension ``start`` on, as numbers.

    Raises:
        UnsupportedModel: one of these sizes is unknown.
    """
    dims = known_dims(value)
    sizes = [] if dims is None else [dim for dim in dims[start:] if dim is not None]
    if dims is None or len(sizes) < len(dims[start:]):
        raise refuse(
            node,
            f"the shape of '{value.name}' is not known from dimension {start} on",
            "fix it with --dim NAME=SIZE, or export the model with fixed sizes",
        )
    return sizes


def require_array(node: ir.Node, index: int, what: str) -> np.ndarray:
    """Return the constant that a node reads as its input at ``index``.

    ``what`` describes the numbers of the constant in the error message, such as "axes".

    Raises:
        UnsupportedModel: the input is computed in the graph.
    """
    array = known_array(node.inputs[index])
    if array is None:
        raise refuse(
            node,
            f"its {what} are computed in the graph",
            f"{advise_fixing(node, index)}export it with fixed {what}",
        )
    return array


def advise_fixing(node: ir.Node, index: int) -> str:
    """Return advice to fix what decides a node's input, if it is sizes or settings of the model.

    The advice is the beginning of a sentence with other advice, or an empty string.
    """
    value, graph = node.inputs[index], node.graph
    if value is None or not isinstance(graph, ir.Graph):
        return ""
    settings = list_settings(value, graph.inputs)
    if settings:
        return f"they depend on {name_settings(settings)}; otherwise "
    sizes = list_open_sizes(value, graph, Inference(graph.opset_imports[""]))
    return f"they depend on {name_sizes(sizes)}; otherwise " if sizes else ""


def refuse(node: ir.Node, reason: str, advice: str) -> UnsupportedModel:
    """Return the error for a node that cannot be rewritten.

    ``reason`` states what prevents the rewrite.  ``advice`` states how the user can avoid the
    error.
    """
    return UnsupportedModel(f"node '{node.name}' ({node.op_type})", reason, advice)


def read_extents(builder: NodeBuilder, node: ir.Node, value: ir.Value) -> list[Extent]:
    """List the extents (sizes) of all dimensions of a value.

    Raises:
        UnsupportedModel: the number of dimensions is unknown.
    """
    require_rank(node, value)
    return [
        builder.shape(value, axis, axis + 1) if dim is None else dim
        for axis, dim in enumerate(known_dims(value) or [])
    ]


def to_vector(builder: NodeBuilder, extent: Extent) -> ir.Value:
    """Return an extent (a size) as an int64 vector with one element."""
    return builder.integers([extent]) if isinstance(extent, int) else extent


def multiply(builder: NodeBuilder, extents: Sequence[Extent]) -> Extent:
    """Return the product of several extents (sizes)."""
    known, result = 1, None
    for extent in extents:
        if isinstance(extent, int):
            known *= extent
        else:
            result = extent if result is None else builder.op("Mul", result, extent)
    if result is None:
        return known
    return result if known == 1 else builder.op("Mul", result, builder.integers([known]))


def divide(builder: NodeBuilder, extent: Extent, by: int) -> Extent:
    """Divide an extent (a size) by ``by``, and round the result down."""
    if isinstance(extent, int):
        return extent // by
    return extent if by == 1 else builder.op("Div", extent, builder.integers([by]))


def add(builder: NodeBuilder, extent: Extent, number: int) -> Extent:
    """Add a number to an extent (a size)."""
    if isinstance(extent, int):
        return extent + number
    return extent if number == 0 else builder.op("Add", extent, builder.integers([number]))


def join(builder: NodeBuilder, extents: Sequence[Extent]) -> ir.Value:
    """Concatenate extents (sizes) into an int64 vector that can be used as a shape."""
    parts: list[ir.Value] = []
    row: list[int] = []
    for extent in extents:
        if isinstance(extent, int):
            row.append(extent)
            continue
        if row:
            parts.append(builder.integers(row))
            row = []
        parts.append(extent)
    if row:
        parts.append(builder.integers(row))
    return parts[0] if len(parts) == 1 else builder.op("Concat", *parts, axis=0)


def reshape(builder: NodeBuilder, value: ir.Value, extents: Sequence[Extent]) -> ir.Value:
    """Reshape a value to the given extents (sizes).

    If exactly one extent is computed in the graph, the Reshape node infers it from the others.
    """
    unknown = [extent for extent in extents if not isinstance(extent, int)]
    if len(unknown) == 1:
        extents = [extent if isinstance(extent, int) else -1 for extent in extents]
    return builder.op("Reshape", value, join(builder, extents))


def count_up(builder: NodeBuilder, extent: Extent) -> ir.Value:
    """Return the numbers from 0 to ``extent - 1`` as an int64 vector."""
    if isinstance(extent, int):
        return builder.integers(range(extent))
    end = builder.op("Squeeze", extent, builder.integers([0]))
    return builder.op("Range", builder.integer(0), end, builder.integer(1))


def to_number(builder: NodeBuilder, extent: Extent, dtype: ir.DataType | None) -> ir.Value:
    """Convert an extent (a size) to a value of type ``dtype``, for calculations."""
    if isinstance(extent, int):
        return builder.number(extent, dtype)
    return builder.op("Cast", extent, to=(dtype or ir.DataType.FLOAT).value)
