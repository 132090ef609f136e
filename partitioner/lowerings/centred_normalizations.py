"""Subtract the mean before normalizations that would lose precision by cancellation.

For LayerNormalization and GroupNormalization, ONNX Runtime 1.19.2 computes the variance in float32
as the mean of the squares minus the square of the mean.  If the mean is much larger than the
standard deviation, this difference has few correct digits.  For rows of mean 300 and standard
deviation 0.5, results are wrong by 0.1; for larger means, they are NaN.

Adding the same number to all elements does not change the result of a normalization, so the mean
can be subtracted first.  The kernel then reads elements with a mean of about 0, and the variance is
exact enough.  The gradient does not change either, because the gradient of a normalization sums to
0, and therefore the gradient of the mean is 0.  For this reason the mean is subtracted after
differentiation; the backward pass needs no additional nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from splitonnx.errors import count_some
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_rank
from splitonnx.partitioner.graphs.traversals import list_bodies
from splitonnx.partitioner.lowerings.optimization_barriers import (
    find_producer,
    list_readers,
    skip,
)

_TRANSPARENT = ("Cast", "Identity")
"""Operators that ONNX Runtime skips when it looks for the formula of a LayerNormalization."""

_NARROW = 4
"""Numbers normalized together that data may well make nearly equal.

Where there are more, their mean exceeds their deviation in all rows or in none, which random inputs
show.
"""


def describe_narrow(graph: ir.Graph) -> str:
    """Describe the normalizations of few numbers, which lose precision in a model left as it is.

    Return an empty string if there are none.  Those whose sizes are not known are left out.
    """
    names = [node.outputs[0].name or "" for node in _list_narrow(graph)]
    if not names:
        return ""
    verb = "normalizes" if len(names) == 1 else "normalize"
    return (
        f"{count_some(names, _NARROW)} {verb} at most {_NARROW} numbers at a time: where these are "
        "nearly equal, ONNX Runtime 1.19 loses digits in the model given and in the merged one, "
        "but not in training and predict; ONNX Runtime 1.32 does not (docs/commands.md)"
    )


def _list_narrow(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in _list_floating(graph) if 0 < _count_normalized(node) <= _NARROW)


def _count_normalized(node: ir.Node) -> int:
    """Count the numbers that a node normalizes together; return 0 if that is not known."""
    mean = next((mean for _, mean in _find_gaps(node)), None) if node.op_type == "Div" else None
    x = node.inputs[0] if mean is None else mean.inputs[0]
    if x is None or x.shape is None:
        return 0
    sizes = [size if isinstance(size, int) else 0 for size in x.shape]
    if node.op_type == "LayerNormalization":
        return math.prod(sizes[node.attributes.get_int("axis", -1) :])
    if node.op_type == "GroupNormalization":
        return math.prod(sizes[1:]) // node.attributes.get_int("num_groups", 1)
    kept = None if mean is None else mean.outputs[0].shape
    if kept is None or len(kept) != len(sizes):
        return 0
    axes = [axis for axis, size in enumerate(kept) if size != x.shape[axis]]
    return math.prod(sizes[axis] for axis in axes) if axes else 0


def centre_normalizations(graph: ir.Graph) -> None:
    """Subtract the mean before each normalization that would lose precision; change ``graph``.

    Formulas that ONNX Runtime replaces with a LayerNormalization are changed as well, and so are
    the nodes in subgraph bodies.  Normalizations of float64 are left unchanged.  Call this function
    after differentiation, when the graph already has its gradients.
    """
    for node in _list_floating(graph):
        if node.op_type == "LayerNormalization":
            _centre_layer_norm(node)
        elif node.op_type == "GroupNormalization":
            _centre_group_norm(node)
        elif node.op_type == "Div":
            _centre_formula(node)


def _list_floating(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the standard nodes of a graph and of its bodies, but for those of float64.

    The nodes of a graph may be changed while they are yielded.
    """
    for node in list(graph):
        for body in list_bodies(node):
            yield from _list_floating(body)
        if not node.domain and node.inputs and not _is_double(node.inputs[0]):
            yield node


def _is_double(value: ir.Value | None) -> bool:
    return value is None or value.dtype == ir.DataType.DOUBLE


def _centre_layer_norm(node: ir.Node) -> None:
    x = node.inputs[0]
    assert x is not None
    axis, rank = node.attributes.get_int("axis", -1), known_rank(x)
    if rank is None and axis >= 0:
        return
    builder = NodeBuilder(f"{node.outputs[0].name}/centred")
    mean = builder.op("ReduceMean", x, builder.integers(_list_axes(axis, rank)), keepdims=1)
    centred = _subtract(builder, x, mean)
    _insert(node, builder)
    node.replace_input_with(0, centred)
    if len(node.outputs) > 1:
        _correct_mean(node, mean, centred)


def _list_axes(axis: int, rank: int | None) -> list[int]:
    return list(range(axis, 0)) if rank is None else list(range(axis % rank, rank))


def _correct_mean(node: ir.Node, mean: ir.Value, centred: ir.Value) -> None:
    """Have gradients read the centred input, and others the mean of the input given.

    The node's second output is now the mean of the centred input, which the gradient needs.
    """
    own = node.outputs[1]
    readers = [(reader, index) for reader, index in own.uses() if _is_gradient(reader)]
    for reader, _ in readers:
        reader.replace_input_with(1, centred)
    if len(readers) == len(own.uses()) and not own.is_graph_output():
        return
    builder = NodeBuilder(f"{node.outputs[0].name}/mean")
    total = builder.op("Add", own, mean)
    total.type, total.shape, total.name = own.type, own.shape, own.name
    own.name = f"{own.name}/centred"
    own.replace_all_uses_with(total, replace_graph_outputs=True)
    for reader, index in [*readers, (builder.nodes[-1], 0)]:
        reader.replace_input_with(index, own)
    assert node.graph is not None
    node.graph.insert_after(node, builder.nodes)


def _is_gradient(node: ir.Node) -> bool:
    return node.op_type == "LayerNormalizationGrad"


def _centre_group_norm(node: ir.Node) -> None:
    x, groups = node.inputs[0], node.attributes.get_int("num_groups")
    assert x is not None
    assert groups is not None
    builder = NodeBuilder(f"{node.outputs[0].name}/centred")
    grouped = builder.op("Reshape", x, builder.integers([0, groups, -1]))
    mean = builder.op("ReduceMean", grouped, builder.integers([2]), keepdims=1)
    flat = builder.op("Sub", grouped, mean)
    centred = builder.op("Reshape", flat, builder.op("Shape", x))
    centred.type, centred.shape = x.type, x.shape
    _insert(node, builder)
    node.replace_input_with(0, centred)


def _centre_formula(node: ir.Node) -> None:
    """Centre the input of a formula that ONNX Runtime replaces by a LayerNormalization.

    The formula divides x - mean(x) by the root of the mean of its squares.  ``node`` is the Div.
    """
    gaps = _find_gaps(node)
    means = {mean for _, mean in gaps}
    if not gaps or len(means) > 1:
        return
    mean, x = means.pop(), gaps[0][0].inputs[0]
    subtractions = {gap for gap, _ in gaps}
    result = mean.outputs[0]
    read = {reader for reader, _ in list_readers(result)}
    if x is None or _is_double(x) or read != subtractions or result.is_graph_output():
        return
    if any(skip(reader.inputs[0]) is not skip(x) for reader in (mean, *subtractions)):
        return
    builder = NodeBuilder(f"{node.outputs[0].name}/centred")
    own = builder.op("ReduceMean", x, *mean.inputs[1:], **_copy_attributes(mean))
    centred = _subtract(builder, x, own)
    _insert(mean, builder)
    for reader in (mean, *subtractions):
        reader.replace_input_with(0, centred)


def _find_gaps(node: ir.Node) -> list[tuple[ir.Node, ir.Node]]:
    """List the Subs of a formula, each with the ReduceMean whose result it subtracts."""
    value: ir.Value | None = node.inputs[1]
    for kind in ("Sqrt", "Add", "ReduceMean", "Pow"):
        producer = _find_operand(value, kind)
        if producer is None:
            return []
        value = _pick_variance(producer) if kind == "Add" else producer.inputs[0]
    gaps = [_find_operand(value, "Sub"), _find_operand(node.inputs[0], "Sub")]
    found = {gap: _find_operand(gap.inputs[1], "ReduceMean") for gap in gaps if gap is not None}
    if None in gaps:
        return []
    return [(gap, mean) for gap, mean in found.items() if mean is not None]


def _find_operand(value: ir.Value | None, kind: str) -> ir.Node | None:
    return find_producer(value, kind, _TRANSPARENT)


def _pick_variance(node: ir.Node) -> ir.Value | None:
    """Return the operand of an Add that is a mean; the other one is epsilon."""
    means = (value for value in node.inputs if _find_operand(value, "ReduceMean") is not None)
    return next(means, None)


def _copy_attributes(node: ir.Node) -> dict[str, ir.Attr]:
    return dict(node.attributes)


def _subtract(builder: NodeBuilder, x: ir.Value, mean: ir.Value) -> ir.Value:
    mean.type = x.type
    centred = builder.op("Sub", x, mean)
    centred.type, centred.shape = x.type, x.shape
    return centred


def _insert(node: ir.Node, builder: NodeBuilder) -> None:
    assert node.graph is not None
    node.graph.insert_before(node, builder.nodes)
