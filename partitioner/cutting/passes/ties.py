"""Merge parameters that the user declares to be the same.

Exporters may store a matrix that a model uses twice as two matrices, often with one of them
transposed.  If these were trained separately, they would differ after the first step.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, MutableMapping, Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UsageError, list_some, quote
from splitonnx.partitioner.graphs.traversals import map_values


def tie_weights(
    graph: ir.Graph,
    weights: MutableMapping[str, ir.TensorProtocol],
    ties: Sequence[tuple[str, str]],
) -> None:
    """Replace the second parameter of each pair by the first one, in place.

    If the second matrix is the transpose of the first, a Transpose node computes it.  ``weights``
    maps the names of the graph inputs that are weights to their tensors; the second parameter is
    removed from it.

    Raises:
        UsageError: a name is not the name of a weight, the values of the two parameters differ, or
            both names are the same.
    """
    for first, second in ties:
        kept, dropped = (_read(weights, name, first, second) for name in (first, second))
        if first == second:
            raise UsageError(f"--tie {first}={second} names the same parameter twice")
        values = map_values(graph)
        source, value = values[first], values[second]
        if not _is_equal(kept, dropped):
            difference = find_difference(kept, dropped)
            if difference:
                raise UsageError(f"--tie {first}={second}: the two are not equal; {difference}")
            node = ir.node("Transpose", [source], {"perm": [1, 0]}, name=f"{second}/tied")
            graph.insert_before(graph[0], node)
            source = node.outputs[0]
            source.name, source.type = f"{second}.tied", value.type
            source.shape = value.shape
        value.replace_all_uses_with(source, replace_graph_outputs=True)
        graph.inputs.remove(value)
        del weights[second]


def describe_symmetric(
    ties: Sequence[tuple[str, str]], weights: Mapping[str, ir.TensorProtocol]
) -> str:
    """Return a sentence about tied matrices that equal their transposes, or an empty string."""
    found = [
        f"{first}={second}"
        for first, second in ties
        if first in weights and is_symmetric(weights[first].numpy())
    ]
    if not found:
        return ""
    return (
        f"--tie {', '.join(found)}: the numbers are those of a symmetric matrix and fit transposed "
        "too; they are tied as they are, not transposed; if the model used one of them transposed, "
        "export it so that the file stores the matrix once"
    )


def is_symmetric(array: np.ndarray) -> bool:
    """Return whether an array is a matrix of several rows that equals its transpose."""
    return array.ndim == 2 and len(array) > 1 and _is_equal(array, array.T)


def _read(
    weights: Mapping[str, ir.TensorProtocol], name: str, first: str, second: str
) -> np.ndarray:
    if name not in weights:
        nearest = difflib.get_close_matches(name, list(weights), n=3, cutoff=0.5)
        offer = f"did you mean {quote(nearest)}?" if nearest else f"it has {list_some(weights)}"
        raise UsageError(f"--tie {first}={second}: the model has no parameter '{name}'; {offer}")
    array: np.ndarray = weights[name].numpy()
    return array


def find_difference(kept: np.ndarray, dropped: np.ndarray) -> str:
    """Return why two parameters cannot be tied, or an empty string if they can.

    Two parameters can be tied if they are equal, or if one matrix is the transpose of the other.
    """
    if kept.dtype != dropped.dtype:
        return f"their types are {kept.dtype} and {dropped.dtype}"
    if _is_equal(kept, dropped) or (kept.ndim == 2 and _is_equal(kept.T, dropped)):
        return ""
    is_turned = kept.ndim == 2 and kept.shape == dropped.shape[::-1]
    if kept.shape != dropped.shape and not is_turned:
        return f"their shapes are {list(kept.shape)} and {list(dropped.shape)}"
    other = dropped if kept.shape == dropped.shape else dropped.T
    difference = np.abs(np.subtract(kept, other, dtype=np.float64)).max()
    return f"their numbers differ by up to {difference:.1e}"


def _is_equal(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and np.array_equal(first, second)
