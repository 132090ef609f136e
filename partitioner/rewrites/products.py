"""Rewrite Gemm, MatMul and Det so that they can be differentiated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims, known_rank

Values = Sequence[ir.Value | None]

_LARGEST_DETERMINANT = 24
"""The largest size of a matrix.  The gradient of Det needs one determinant per matrix element."""


def rewrite_gemm(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Remove the bias from a Gemm if its ``beta`` is 0; leave other nodes unchanged.

    A bias multiplied by 0 has no effect, but onnxruntime-training has no gradient for it.
    """
    if node.attributes.get_float("beta", 1.0) != 0 or len(node.inputs) < 3:
        return None
    kept = {name: node.attributes.get_int(name, 0) for name in ("transA", "transB")}
    alpha = node.attributes.get_float("alpha", 1.0)
    return [builder.op("Gemm", *node.inputs[:2], alpha=alpha, **kept)]


def rewrite_matmul(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite MatMul with a vector as a product of matrices; leave other nodes unchanged.

    onnxruntime-training's gradient builder rejects the product of a vector and a stack of matrices.
    """
    a, b = node.inputs
    assert a is not None
    assert b is not None
    ranks = known_rank(a), known_rank(b)
    if 1 not in ranks:
        return None
    gone = []
    if ranks[0] == 1:
        a = builder.op("Unsqueeze", a, builder.integers([0]))
        gone.append(-2)
    if ranks[1] == 1:
        b = builder.op("Unsqueeze", b, builder.integers([1]))
        gone.append(-1)
    return [builder.op("Squeeze", builder.op("MatMul", a, b), builder.integers(gone))]


def rewrite_determinant(builder: NodeBuilder, node: ir.Node) -> Values:
    """Keep Det and attach its derivative, the matrix of cofactors.

    onnxruntime-training has no gradient for Det, so its derivative is attached explicitly (see
    :mod:`tangents`).  Each cofactor is computed as the determinant of a minor.  This requires no
    inverse, and therefore singular matrices also have a gradient.

    Raises:
        UnsupportedModel: the matrices are not square, too large, or of unknown size.
    """
    (x,) = node.inputs
    assert x is not None
    dims = known_dims(x)
    size = dims[-1] if dims else None
    if dims is None or size is None or size != dims[-2] or size > _LARGEST_DETERMINANT:
        raise UnsupportedModel(
            f"node '{node.name}' (Det)",
            f"matrices are to be square and of a known size up to {_LARGEST_DETERMINANT}",
            "freeze the parameters before it with --freeze",
        )
    still = builder.detach(x)
    still.type, still.shape = x.type, x.shape
    change = builder.op("Sub", x, still)
    if size > 1:
        change = builder.op("Mul", change, builder.detach(_find_cofactors(builder, still, size)))
    slope = builder.op("ReduceSum", change, builder.integers([-2, -1]), keepdims=0)
    return [builder.op("Add", builder.detach(builder.op("Det", still)), slope)]


def _find_cofactors(builder: NodeBuilder, x: ir.Value, size: int) -> ir.Value:
    """Return the cofactor of each element, in the shape (..., n, n) of ``x``."""
    rank = known_rank(x) or 0
    others = [[j for j in range(size) if j != i] for i in range(size)]
    index = builder.tensor(ir.tensor(np.array(others, np.int64)))
    rows = builder.op("Gather", x, index, axis=rank - 2)  # (..., i, n - 1, n)
    both = builder.op("Gather", rows, index, axis=rank)  # (..., i, n - 1, j, n - 1)
    lead = list(range(rank - 2))
    minors = builder.op("Transpose", both, perm=[*lead, rank - 2, rank, rank - 1, rank + 1])
    places = np.indices((size, size)).sum(0)
    signs = np.where(places % 2 == 0, 1.0, -1.0).astype(np.float32)
    return builder.op("Mul", builder.op("Det", minors), builder.tensor(ir.tensor(signs)))
