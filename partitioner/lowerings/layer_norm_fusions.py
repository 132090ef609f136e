"""Prevent ONNX Runtime's optimizer from mistaking other formulas for a layer normalization.

The rules LayerNormFusion and SimplifiedLayerNormFusion replace the formula of a layer normalization
with one operator.  ONNX Runtime 1.19.2 also replaces formulas that only look similar, and silently
computes wrong results.  It does not check:

- whether the exponent of the Pow is 2, and is its second input;
- the order of the operands of the Sub and the Div;
- whether the added epsilon is a single number;
- whether the scale has one element for each element of the axis.

The rule SkipLayerNormFusion merges an Add with the LayerNormalization after it, even if the
normalization is over several axes.  The merged operator then refuses to run.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import known_array
from splitonnx.partitioner.graphs.traversals import list_bodies
from splitonnx.partitioner.lowerings.optimization_barriers import (
    find_producer,
    insert_barrier,
    list_readers,
    skip,
)

_TRANSPARENT = ("Cast", "Identity")
"""Operators that do not prevent the optimizer's rule if they are between nodes of the formula."""


def separate_layer_norms(graph: ir.Graph) -> None:
    """Insert barriers so that ONNX Runtime does not wrongly merge nodes into a layer normalization.

    The graph is changed in place, including the subgraph bodies of control-flow nodes.
    """
    for node in list(graph):
        for body in list_bodies(node):
            separate_layer_norms(body)
        if node.op_type == "Div" and not node.domain:
            _separate_division(node)
        if node.op_type == "LayerNormalization" and not node.domain:
            _separate_sum(node)


def _separate_division(node: ir.Node) -> None:
    roots = [i for i, value in enumerate(node.inputs) if _trace(value, "Sqrt") is not None]
    if roots and not _is_layer_norm(node):
        insert_barrier(node, roots[0])


def _separate_sum(node: ir.Node) -> None:
    if not _is_over_last_axis(node) and _trace(node.inputs[0], "Add") is not None:
        insert_barrier(node, 0)


def _trace(value: ir.Value | None, kind: str) -> ir.Node | None:
    return find_producer(value, kind, _TRANSPARENT)


def _is_layer_norm(node: ir.Node) -> bool:
    """Return whether a Div by a square root belongs to a layer normalization.

    Return ``True`` as well if it does not look like that to the optimizer, which then does not
    merge it.
    """
    reverse = _trace(node.inputs[0], "Sqrt") is not None
    root = _trace(node.inputs[0 if reverse else 1], "Sqrt")
    added = None if root is None else _trace(root.inputs[0], "Add")
    if added is None:
        return True
    means = [i for i, value in enumerate(added.inputs) if _trace(value, "ReduceMean") is not None]
    mean = _trace(added.inputs[means[0]], "ReduceMean") if means else None
    power = None if mean is None else _trace(mean.inputs[0], "Pow")
    if mean is None or power is None:
        return True
    epsilon = known_array(added.inputs[1 - means[0]])
    exponent = known_array(power.inputs[1])
    if reverse or epsilon is None or epsilon.size != 1 or not _is_two(exponent):
        return False
    return (
        _is_deviation(node.inputs[0], power.inputs[0])
        and _is_over_last_axis(mean)
        and all(_has_gain(node.outputs[0], reader) for reader, _ in list_readers(node.outputs[0]))
    )


def _is_two(exponent: np.ndarray | None) -> bool:
    return exponent is not None and bool((exponent == 2).all())


def _is_deviation(divided: ir.Value | None, squared: ir.Value | None) -> bool:
    """Return whether the same x, or the same x - mean(x), is both divided and squared."""
    first, second = _trace(divided, "Sub"), _trace(squared, "Sub")
    if first is None or second is None:
        return skip(divided, _TRANSPARENT) is skip(squared, _TRANSPARENT)
    x, mean = first.inputs[0], _trace(first.inputs[1], "ReduceMean")
    pairs = zip(first.inputs, second.inputs, strict=True)
    same = all(skip(one, _TRANSPARENT) is skip(other, _TRANSPARENT) for one, other in pairs)
    return same and mean is not None and skip(mean.inputs[0], _TRANSPARENT) is skip(x, _TRANSPARENT)


def _is_over_last_axis(node: ir.Node) -> bool:
    """Return whether a LayerNormalization or a ReduceMean is over the last axis only."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    last = {-1} if shape is None else {-1, len(shape) - 1}
    if node.op_type == "LayerNormalization":
        return node.attributes.get_int("axis", -1) in last
    axes = known_array(node.inputs[1]) if len(node.inputs) > 1 else None
    return axes is not None and axes.size == 1 and int(axes.flat[0]) in last


def _has_gain(normal: ir.Value, reader: ir.Node) -> bool:
    """Return whether ``reader`` multiplies the normalized tensor by one number per element."""
    if reader.op_type == "Cast" and not reader.domain:
        cast = reader.outputs[0]
        return all(_has_gain(cast, next_one) for next_one, _ in list_readers(cast))
    if reader.op_type != "Mul" or reader.domain:
        return True  # the optimizer looks for a Mul
    gains = [value for value in reader.inputs if skip(value) is not normal]
    shape = normal.shape
    if not gains or gains[0] is None or not gains[0].shape or shape is None:
        return False
    return bool(gains[0].shape[-1] == shape[-1])
