"""Formulas for matrix products and convolutions that were fused with other operations.

These operations are transposes, multiplications by a factor, additions and activations.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, take_input, take_inputs
from splitonnx.partitioner.normalization.fused.activations import write_activation
from splitonnx.partitioner.normalization.fused.operands import (
    find_dtype,
    find_rank,
    refuse,
    take_optional,
)

_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_GEMM = ("alpha", "beta", "transA", "transB")


def write_matmul(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Compute ``alpha * A @ B``.

    If ``transA`` is set, the last two axes of A are swapped first; ``transB`` does the same for B.
    """
    if any(node.attributes.get_int(name, 0) for name in ("transBatchA", "transBatchB")):
        raise refuse(node, "it moves the batch of an operand")
    left, right = take_inputs(node, 2)
    if node.attributes.get_int("transA", 0):
        left = _swap(builder, left)
    if node.attributes.get_int("transB", 0):
        right = _swap(builder, right)
    product = builder.op("MatMul", left, right)
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha == 1.0:
        return [product]
    return [builder.op("Mul", product, builder.number(alpha, find_dtype(take_input(node))))]


def write_conv(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Compute a convolution, add the optional fourth input, and apply the node's activation."""
    kept = {name: node.attributes[name] for name in _CONV if name in node.attributes}
    made = builder.ops("Conv", list(node.inputs[:3]), 1, kept)[0]
    if (summand := take_optional(node, 3)) is not None:
        made = builder.op("Add", made, summand)
    return [write_activation(builder, node, made)]


def write_gemm(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Compute a general matrix product (Gemm), and apply the node's activation."""
    kept = {name: node.attributes[name] for name in _GEMM if name in node.attributes}
    made = builder.ops("Gemm", list(node.inputs[:3]), 1, kept)[0]
    return [write_activation(builder, node, made)]


def _swap(builder: NodeBuilder, value: ir.Value) -> ir.Value:
    rank = find_rank(value)
    if rank < 2:
        return value
    return builder.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])
