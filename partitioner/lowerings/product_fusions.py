"""Prevent ONNX Runtime's optimizer from wrongly merging nodes into matrix products.

The rule MatMulScaleFusion merges a MatMul with a Mul or Div by a constant that has one element.  If
this constant has more axes than the tensor that it scales, the result has too few axes.  The rule
MatmulTransposeFusion merges a Transpose into a MatMul even if the other operand is a vector, and
the result is then wrong.  ONNX Runtime 1.19.2 reports no error in either case.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import list_bodies, walk_back
from splitonnx.partitioner.lowerings.optimization_barriers import (
    find_producer,
    insert_barrier,
    list_readers,
)


def separate_products(graph: ir.Graph) -> None:
    """Change the graph so that ONNX Runtime does not wrongly merge nodes into matrix products.

    The graph is changed in place, including the subgraph bodies of control-flow nodes.
    """
    for node in list(graph):
        for body in list_bodies(node):
            separate_products(body)
        if node.domain:
            continue
        if node.op_type in ("Mul", "Div"):
            _separate_scaling(node)
        elif node.op_type == "MatMul":
            _write_vectors_as_matrices(node)


def _separate_scaling(node: ir.Node) -> None:
    """Insert barriers between a scaling that adds axes and the MatMuls before and after it."""
    if not _adds_axes(node):
        return
    for index, value in enumerate(node.inputs):
        if find_producer(value, "MatMul") is not None:
            insert_barrier(node, index)
    for reader, index in list(list_readers(node.outputs[0])):
        if reader.op_type == "MatMul" and not reader.domain:
            insert_barrier(reader, index)


def _adds_axes(node: ir.Node) -> bool:
    ranks = [None if v is None or v.shape is None else len(v.shape) for v in node.inputs]
    ones = [
        v is not None and v.shape is not None and all(size == 1 for size in v.shape)
        for v in node.inputs
    ]
    for (rank, is_one), other in zip(zip(ranks, ones, strict=True), ranks[::-1], strict=True):
        if is_one and rank and (other is None or rank > other):
            return True
    return False


def _write_vectors_as_matrices(node: ir.Node) -> None:
    """Replace a vector with a matrix of one row or column if the other operand is transposed."""
    ranks = [None if v is None or v.shape is None else len(v.shape) for v in node.inputs]
    if ranks.count(1) != 1 or not _reads_transpose(node.inputs[1 - ranks.index(1)]):
        return
    index = ranks.index(1)
    builder = NodeBuilder(f"{node.outputs[0].name}/matrices")
    operands = list(node.inputs)
    operands[index] = builder.op("Unsqueeze", operands[index], builder.integers([index]))
    product = builder.op("MatMul", *operands)
    builder.nodes[-1].name = node.name  # by which errors name it
    axis = builder.integers([index - 2])  # the axis of the row, or of the column
    builder.replace(node, [builder.op("Squeeze", product, axis)])


def _reads_transpose(value: ir.Value | None) -> bool:
    nodes, _ = walk_back([] if value is None else [value])
    return any(node.op_type == "Transpose" and not node.domain for node in nodes)
