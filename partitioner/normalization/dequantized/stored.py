"""Weights that a model stores as integers, casts to floats and multiplies by a scale.

Models that are quantized by hand, to make the file smaller, have their weights in this form.  The
activations are floats throughout.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from splitonnx.errors import list_some
from splitonnx.partitioner.graphs.builders import known_array
from splitonnx.partitioner.graphs.traversals import list_nodes
from splitonnx.partitioner.normalization.dequantized.weights import FloatWeights

_NARROW = frozenset(
    {
        ir.DataType.INT4,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.UINT4,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
    }
)


def replace_scaled(node: ir.Node, weights: FloatWeights) -> bool:
    """Replace ``Mul(Cast(integers), scale)`` by a float weight of the same name, in place.

    A zero point may be subtracted from the integers before.  All of them must be stored in the
    model.  Return whether the node was replaced.
    """
    floats, result = _compute(node), node.outputs[0]
    graph = node.graph
    if floats is None or not isinstance(graph, ir.Graph):
        return False
    name = result.name or ""
    result.name = None
    value = ir.Value(name=name, const_value=ir.tensor(floats, name=name))
    ir.convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    graph.register_initializer(value)
    weights.names.append(name)
    return True


def _compute(node: ir.Node) -> np.ndarray | None:
    """Return the floats that a Mul makes of stored integers, or ``None`` if it makes others."""
    for whole, other in (node.inputs, reversed(node.inputs)):
        scale, integers = known_array(other), _read_whole(whole)
        if scale is None or integers is None:
            continue
        if np.broadcast_shapes(integers.shape, scale.shape) == integers.shape:
            floats: np.ndarray = integers * scale
            return floats
    return None


def _read_whole(value: ir.Value | None) -> np.ndarray | None:
    """Return the whole numbers, as floats, that a Cast or a Sub after it makes of integers."""
    node = None if value is None else value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Sub":
        whole, zero = _read_whole(node.inputs[0]), known_array(node.inputs[1])
        if whole is None or zero is None:
            return None
        if np.broadcast_shapes(whole.shape, zero.shape) != whole.shape:
            return None
        shifted: np.ndarray = whole - zero
        return shifted
    if not _is_cast_weight(node):
        return None
    integers = known_array(node.inputs[0])
    dtype = ir.DataType(node.attributes["to"].as_int())
    return None if integers is None else integers.astype(dtype.numpy())


def _is_cast_weight(node: ir.Node) -> bool:
    """Return whether a node casts a stored matrix of integers of 4, 8 or 16 bits to floats."""
    source = node.inputs[0] if node.op_type == "Cast" and not node.domain else None
    tensor = None if source is None else ir.convenience.get_const_tensor(source)
    if tensor is None or tensor.dtype not in _NARROW or len(tensor.shape) < 2:
        return False
    return ir.DataType(node.attributes["to"].as_int()).is_floating_point()


def find_stored_integers(graph: ir.Graph) -> dict[str, int]:
    """Return how many numbers each stored matrix of integers has that is cast to floats."""
    found = {}
    for node in list_nodes(graph):
        source = node.inputs[0] if _is_cast_weight(node) else None
        tensor = None if source is None else ir.convenience.get_const_tensor(source)
        if source is not None and tensor is not None:
            found[source.name or ""] = tensor.size
    return found


def describe_stored_integers(found: Mapping[str, int]) -> str:
    """Return a sentence about weights stored as integers, which are not trained."""
    return (
        f"{list_some(tuple(found))}: {sum(found.values()):,} numbers stored as integers are not "
        "trained; --dequantize makes float weights of those that are multiplied by a stored scale"
    )
