"""Use one name for sizes that the model's operators require to be equal.

An exporter may name the batch size of each input differently, although an operator requires them to
be equal.  Each party compares all sizes that have the same name before it runs anything.  With one
name, a mismatch is therefore refused with an error that states both sizes.  Sizes that an operator
can broadcast keep their names, because one of them may be 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import onnx_ir as ir

from splitonnx.expressions import is_name, parse_terms
from splitonnx.partitioner.graphs.traversals import find_dependents

Place = tuple[ir.Value | None, int]
"""A value and the index of one of its dimensions; a negative index counts from the end."""
_Ties = Callable[[ir.Node], Iterator[tuple[Place, Place]]]


def join_sizes(graph: ir.Graph, weights: Collection[str]) -> bool:
    """Rename sizes of the inputs in place, so that sizes that must be equal have one name.

    Sizes that also occur in an expression are not renamed.  The first of the names is kept.
    ``weights`` names the graph inputs that are not data.  Return whether a size was renamed.  If
    so, the shapes of all tensors that depend on a changed input are cleared and have to be inferred
    again.
    """
    raw = [value for value in graph.inputs if value.name not in weights]
    order = {name: index for index, name in enumerate(_list_plain_names(raw))}
    if len(order) < 2:
        return False
    renamed: dict[str, str] = {}
    for node in graph:
        if node.op_type not in _TIES or node.domain:
            continue
        for left, right in _TIES[node.op_type](node):
            pair = [_find(renamed, name) for name in (_read(left), _read(right)) if name in order]
            if len(pair) == 2 and pair[0] != pair[1]:
                kept, other = sorted(pair, key=lambda name: order[name])
                renamed[other] = kept
    changed = [value for value in raw if _rename(value, renamed)]
    for value in find_dependents(graph, changed) - set(changed):
        value.shape = None
    return bool(changed)


def _list_plain_names(raw: Iterable[ir.Value]) -> list[str]:
    """List the names of sizes, without names that also occur in an expression."""
    dims = [d.value for v in raw for d in v.shape or () if not isinstance(d, int) and d.value]
    mixed = {
        atom for dim in dims if not is_name(dim) for atoms, _ in parse_terms(dim) for atom in atoms
    }
    return list(dict.fromkeys(dim for dim in dims if is_name(dim) and dim not in mixed))


def _find(renamed: Mapping[str, str], name: str) -> str:
    while name in renamed:
        name = renamed[name]
    return name


def _rename(value: ir.Value, renamed: Mapping[str, str]) -> bool:
    if value.shape is None:
        return False
    dims = [d if isinstance(d, int) else d.value for d in value.shape]
    joined = [_find(renamed, d) if isinstance(d, str) else d for d in dims]
    if joined == dims:
        return False
    value.shape = ir.Shape(joined)
    return True


def _read(place: Place) -> str:
    """Return the name of a dimension, or an empty string if it has none."""
    value, axis = place
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return ""
    dim = value.shape[axis]
    return "" if isinstance(dim, int) else dim.value or ""


def _take(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _tie_gather(node: ir.Node) -> Iterator[tuple[Place, Place]]:
    """Yield the pairs of batch dimensions of data and indices."""
    for axis in range(node.attributes.get_int("batch_dims", 0)):
        yield (_take(node, 0), axis), (_take(node, 1), axis)


def _tie_concat(node: ir.Node) -> Iterator[tuple[Place, Place]]:
    """Yield the pairs of all dimensions but the one along which values are joined."""
    first = _take(node, 0)
    rank = 0 if first is None or first.shape is None else len(first.shape)
    joined = node.attributes.get_int("axis", 0) % max(rank, 1)
    for axis in (axis for axis in range(rank) if axis != joined):
        for other in node.inputs[1:]:
            yield (first, axis), (other, axis)


def _tie_product(node: ir.Node) -> Iterator[tuple[Place, Place]]:
    """Yield the two dimensions over which a product sums."""
    left, right = _take(node, 0), _take(node, 1)
    is_vector = right is not None and right.shape is not None and len(right.shape) == 1
    yield (left, -1), (right, -1 if is_vector else -2)


def _tie_gemm(node: ir.Node) -> Iterator[tuple[Place, Place]]:
    """Yield the two dimensions over which a product of matrices sums."""
    left, right = _take(node, 0), _take(node, 1)
    swaps = [node.attributes.get_int(name, 0) for name in ("transA", "transB")]
    yield (left, 0 if swaps[0] else 1), (right, 1 if swaps[1] else 0)


def _tie_recurrence(node: ir.Node) -> Iterator[tuple[Place, Place]]:
    """Yield the batch dimensions of a sequence paired with those of lengths and initial states."""
    sequence = _take(node, 0)
    yield (sequence, 1), (_take(node, 4), 0)
    for index in (5, 6):
        yield (sequence, 1), (_take(node, index), 1)


def _tie_reversal(node: ir.Node) -> Iterator[tuple[Place, Place]]:
    """Yield the batch dimensions of a sequence and of its lengths."""
    yield (_take(node, 0), node.attributes.get_int("batch_axis", 1)), (_take(node, 1), 0)


def _tie_regions(node: ir.Node) -> Iterator[tuple[Place, Place]]:
    """Yield the dimensions that count the regions and the indices of their images."""
    yield (_take(node, 1), 0), (_take(node, 2), 0)


def _tie_labels(node: ir.Node) -> Iterator[tuple[Place, Place]]:
    """Yield the pairs of dimensions that scores and labels share."""
    scores, labels = _take(node, 0), _take(node, 1)
    yield (scores, 0), (labels, 0)
    rank = 0 if labels is None or labels.shape is None else len(labels.shape)
    for axis in range(1, rank):
        yield (scores, axis + 1), (labels, axis)


_TIES: Mapping[str, _Ties] = {
    "Concat": _tie_concat,
    "GRU": _tie_recurrence,
    "GatherND": _tie_gather,
    "Gemm": _tie_gemm,
    "LSTM": _tie_recurrence,
    "MatMul": _tie_product,
    "NegativeLogLikelihoodLoss": _tie_labels,
    "RNN": _tie_recurrence,
    "ReverseSequence": _tie_reversal,
    "RoiAlign": _tie_regions,
    "SoftmaxCrossEntropyLoss": _tie_labels,
}
"""Map each operator that requires equal sizes to a function that yields pairs of dimensions."""
