"""Products of matrices that read or write transposed matrices themselves, without a Transpose.

The linear layers of PyTorch multiply by transposed weights.  A Transpose of [1024, 256] takes a
sixth of the time of the product of 1024 rows with it, and so does that of the weights' gradient.
Only where a product is wide, its first matrix is better transposed before it.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder

WIDE = 768
"""Columns of a product from which a Transpose before it takes less time than it saves.

ONNX Runtime's product transposes its first matrix again for every 128 columns.  With 512 columns
and 2048 rows to sum over, the Transpose takes as long as it saves; with 3072 columns and 128 rows,
the product takes 0.7 to 0.8 times as long, the Transpose included.
"""
_CONTRIBUTED = "com.microsoft"


def read_turned(node: ir.Node) -> None:
    """Have a MatMul or FusedMatMul read its second matrix as it was before a Transpose.

    Nothing is done if the Transpose has other axes than two, if the ranks are not known, or for
    types other than float32, for which ONNX Runtime has no FusedMatMul on the CPU.
    """
    first, second = node.inputs[:2]
    turn = None if second is None else second.producer()
    if first is None or turn is None or not _turns_matrix(turn):
        return
    matrix = turn.inputs[0]
    if matrix is None or first.shape is None or first.shape.rank() < 2:
        return
    if any(value.dtype != ir.DataType.FLOAT for value in (first, matrix)):
        return
    given = node.attributes
    if any(given.get_int(f"transBatch{side}", 0) for side in "AB"):
        return
    turns_first, turns_second = given.get_int("transA", 0), 1 - given.get_int("transB", 0)
    alpha = given.get_float("alpha", 1.0)
    builder = NodeBuilder(f"{node.outputs[0].name}/turned")
    if alpha == 1.0 and not turns_first and not turns_second:
        product = builder.op("MatMul", first, matrix)
    else:
        product = builder.op(
            "FusedMatMul", first, matrix, alpha=alpha, transA=turns_first, transB=turns_second
        )
        builder.nodes[-1].domain = _CONTRIBUTED
    builder.replace(node, [product])
    _remove_unused(turn)


def write_turned(node: ir.Node) -> None:
    """Have a Gemm write its product in the order of a Transpose that is its only reader."""
    product = None if node.inputs[0] is None else node.inputs[0].producer()
    if product is None or product.op_type != "Gemm" or product.domain or not _turns_matrix(node):
        return
    first, second, *added = product.inputs
    made = product.outputs[0]
    if any(added) or len(made.uses()) > 1 or made.is_graph_output():
        return
    given = product.attributes
    builder = NodeBuilder(f"{node.outputs[0].name}/turned")
    turned = builder.op(
        "Gemm",
        second,
        first,
        alpha=given.get_float("alpha", 1.0),
        transA=1 - given.get_int("transB", 0),
        transB=1 - given.get_int("transA", 0),
    )
    builder.replace(node, [turned])
    _remove_unused(product)


def turn_first(node: ir.Node) -> None:
    """Have a Gemm with many columns read its first matrix from a Transpose, if it transposes it.

    The gradient of a linear layer's weights is such a product.  A Reshape that changes nothing
    keeps ONNX Runtime's optimizer, which portable stages pass, from taking that back.
    """
    first, second, *added = node.inputs
    given = node.attributes
    if first is None or second is None or not given.get_int("transA", 0):
        return
    turns_second = given.get_int("transB", 0)
    rows = None if first.shape is None else first.shape[1]
    columns = None if second.shape is None else second.shape[1 - turns_second]
    if not isinstance(rows, int) or not isinstance(columns, int) or columns < WIDE:
        return
    if first.dtype != ir.DataType.FLOAT:
        return
    builder = NodeBuilder(f"{node.outputs[0].name}/turned")
    transposed = builder.op("Transpose", first, perm=[1, 0])
    turned = builder.op("Reshape", transposed, builder.integers([rows, -1]))
    factors = {name: given.get_float(name, 1.0) for name in ("alpha", "beta")}
    product = builder.op("Gemm", turned, second, *added, transA=0, transB=turns_second, **factors)
    builder.replace(node, [product])


def _turns_matrix(node: ir.Node) -> bool:
    """Return whether a node is a Transpose of a matrix."""
    order = node.attributes.get_ints("perm", ())
    return node.op_type == "Transpose" and not node.domain and tuple(order) == (1, 0)


def _remove_unused(node: ir.Node) -> None:
    made = node.outputs[0]
    if node.graph is not None and not made.uses() and not made.is_graph_output():
        node.graph.remove(node, safe=True)
