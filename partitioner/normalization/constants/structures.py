"""Recognise by the nodes that read them tensors that a network does not train.

The vectors that a spectral norm keeps, and the step sizes of a solver, are stored in the same way
as weights.  Their numbers give nothing away, but the nodes that read them do, whatever their names
are.  This module reads graphs, and numbers only where the nodes leave two meanings open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.traversals import list_bodies, walk_back
from splitonnx.partitioner.normalization.parameters import list_uses

_PRODUCTS = frozenset({"Gemm", "MatMul", "ReduceSum"})
_POWER = _PRODUCTS | {
    *("Add", "Cast", "Clip", "Constant", "Div", "Expand", "Flatten", "Identity", "Max", "Mul"),
    *("Pow", "ReduceL2", "ReduceSumSquare", "Reshape", "Shape", "Sqrt", "Squeeze", "Transpose"),
    "Unsqueeze",
}
"""Operators of the products of a power iteration, and those that normalize its vectors."""
_INDICES = frozenset({"Gather", "Slice", "Split"})
"""Operators that can read single numbers of their first input."""


def find_power_vectors(graph: ir.Graph, weights: Mapping[str, ir.TensorProtocol]) -> set[str]:
    """Find the vectors ``u`` and ``v`` of spectral norms, ``W / (u . (W v))``.

    The divisor is a single number that is computed from a matrix and from one or two vectors, which
    nothing else reads.  With one vector, the other is computed from it.
    """
    found: set[str] = set()
    for node in graph:
        divisors = {"Div": node.inputs[1:2], "Reciprocal": node.inputs[:1]}
        for value in divisors.get(node.op_type, ()):
            if value is not None and _count(value) == 1:
                found |= _find_vectors(value, weights)
    return found


def _find_vectors(divisor: ir.Value, weights: Mapping[str, ir.TensorProtocol]) -> set[str]:
    """Return the vectors if a divisor is the norm of a matrix in this form, or an empty set."""
    nodes, sources = walk_back([divisor])
    known = {value.name or "": value for value in sources if value.name in weights}
    is_data = any(v.name not in known and v.const_value is None for v in sources)
    kinds = {node.op_type for node in nodes}
    if is_data or not kinds <= _POWER or not kinds & _PRODUCTS:
        return set()
    sizes = {name: weights[name].size for name in known if weights[name].size > 1}
    vectors = {
        name
        for name, size in sizes.items()
        if size == max(weights[name].shape.numpy())
        and all(use.node in nodes for use in known[name].uses())
    }
    matrices = sizes.keys() - vectors
    if len(matrices) != 1 or len(vectors) not in (1, 2):
        return set()
    (matrix,) = matrices
    rest = sizes[matrix] // math.prod(sizes[name] for name in vectors)
    is_side = all(_is_side(sizes[name], weights[matrix].shape.numpy()) for name in vectors)
    return vectors if is_side and (len(vectors) == 1 or rest == 1) else set()


def _is_side(size: int, dims: Sequence[int]) -> bool:
    """Return whether a tensor can be reshaped to a matrix that has one of its sizes as a side."""
    return any(size in (dim, math.prod(dims) // dim) for dim in dims)


def is_time_step(value: ir.Value, array: np.ndarray) -> bool:
    """Return whether a vector looks like the step sizes, or the times, of a solver.

    Each step of a loop, which may be unrolled, reads one number of it as a factor, or the
    difference of two.  Factors that a network learns for each layer are read in the same way, but
    some are usually negative or zero.
    """
    if array.size < 2 or array.size != max(array.shape):
        return False
    numbers = array.reshape(-1)
    has_sizes, has_times = (numbers > 0).all(), (np.diff(numbers) > 0).all()
    return bool(has_sizes or has_times) and _is_read_singly(value, is_single=False)


def _is_read_singly(value: ir.Value, *, is_single: bool) -> bool:
    """Return whether nodes read a vector one number at a time, to multiply by it.

    ``is_single`` means that the value is already one of its numbers.
    """
    uses = list(list_uses(value))
    return bool(uses) and all(
        _reads_singly(node, index, is_single=is_single) for node, index in uses
    )


def _reads_singly(node: ir.Node, index: int, *, is_single: bool) -> bool:
    if node.op_type == "Scan":
        row = _find_row(node, index)
        return row is not None and not is_single and _is_read_singly(row, is_single=True)
    if not is_single:
        return (
            node.op_type in _INDICES
            and index == 0
            and all(
                _count(made) == 1 and _is_read_singly(made, is_single=True)
                for made in node.outputs
                if made.uses()
            )
        )
    if node.op_type in ("Add", "Div", "Mul", "Sub") and _count(node.outputs[0]) == 1:
        return _is_read_singly(node.outputs[0], is_single=True)
    return node.op_type == "Mul"


def _find_row(node: ir.Node, index: int) -> ir.Value | None:
    """Return what the body of a Scan reads in each step of the sequence at an input's index."""
    first = len(node.inputs) - node.attributes["num_scan_inputs"].as_int()
    return list_bodies(node)[0].inputs[index] if index >= first else None


def _count(value: ir.Value) -> int | None:
    """Return the number of elements of a value, or ``None`` if it is unknown."""
    dims = list(value.shape) if value.shape is not None else [None]
    sizes = [dim for dim in dims if isinstance(dim, int)]
    return math.prod(sizes) if len(sizes) == len(dims) else None
