"""Weights that a model stores as integers, casts to floats and usually multiplies by a scale.

Models that are quantized by hand, to make the file smaller, have their weights in this form.  The
activations are floats throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from splitonnx.errors import list_some
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, take_input
from splitonnx.partitioner.graphs.traversals import list_nodes
from splitonnx.partitioner.normalization.dequantized.dynamic import find_floats
from splitonnx.partitioner.normalization.dequantized.moved import list_stored
from splitonnx.partitioner.normalization.dequantized.weights import (
    MOVING,
    FloatWeights,
    Settings,
    is_channelwise,
)
from splitonnx.partitioner.normalization.parameters import is_weight_input, list_uses
from splitonnx.partitioner.normalization.quantizations import NARROW

_OPERANDS: Mapping[str, tuple[int, ...]] = {
    "ConvInteger": (1,),
    "MatMulInteger": (0, 1),
    "QLinearConv": (3,),
    "QLinearMatMul": (0, 3),
}
"""Map operators that compute with integers to the inputs that may be weights."""


@dataclass(frozen=True, kw_only=True)
class _Scaled:
    """What a Mul scales: integers that a Cast makes floats of, and their zero point if any."""

    cast: ir.Node
    zero: ir.Value | None
    scale: ir.Value


def replace_scaled(node: ir.Node, weights: FloatWeights) -> bool:
    """Replace ``Mul(Cast(integers), scale)`` by a float weight of the same name, in place.

    A zero point may be subtracted from the integers before.  All of them must be stored in the
    model.  If rows are read from the integers first, by a Gather for example, they are read from
    the float weight instead; the scale must then be a single number.  Return whether the node was
    replaced.
    """
    scaled = _find_scaled(node)
    if scaled is None:
        return _replace_rows(node, weights)
    integers = take_input(scaled.cast)
    if known_array(integers) is None:
        settings = Settings(scale=scaled.scale, zero=scaled.zero)
        if any(is_channelwise(replace(settings, scale=one)) for one in _list_settings(scaled)):
            return _replace_rows(node, weights)
        builder = NodeBuilder(f"{node.outputs[0].name or node.name}/float")
        builder.replace(node, [find_floats(builder, node, weights, integers, settings)])
        return True
    floats, graph = _compute(scaled), node.graph
    if floats is None or not isinstance(graph, ir.Graph):
        return False
    result = node.outputs[0]
    name = result.name or ""
    result.name = None
    value = ir.Value(name=name, const_value=ir.tensor(floats, name=name))
    ir.convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    graph.register_initializer(value)
    weights.names.append(name)
    return True


def _replace_rows(node: ir.Node, weights: FloatWeights) -> bool:
    """Read the rows that a Mul scales from a table of floats instead, in place.

    The scale is one number for each column, or rows of another table, read with the same indices.
    Return whether the node was replaced.
    """
    for whole, scale in (node.inputs, reversed(node.inputs)):
        cast = None if whole is None else whole.producer()
        table = None if cast is None else _find_integers(cast)
        if cast is None or table is None or scale is None:
            continue
        gather, integers = _find_gather(take_input(cast)), known_array(table)
        if gather is None or integers is None or gather.inputs[0] is not table:
            continue
        factors = _find_factors(gather, scale)
        shape = None if factors is None else np.broadcast_shapes(integers.shape, factors.shape)
        if factors is None or shape != integers.shape or not isinstance(node.graph, ir.Graph):
            continue
        name = weights.choose_name(f"{table.name}#float")
        floats = ir.tensor(integers.astype(factors.dtype) * factors, name=name)
        value = ir.Value(name=name, const_value=floats)
        node.graph.register_initializer(value)
        weights.names.append(name)
        builder = NodeBuilder(f"{node.outputs[0].name or node.name}/float")
        builder.replace(node, [builder.op("Gather", value, take_input(gather, 1))])
        return True
    return False


def replace_unscaled(node: ir.Node, weights: FloatWeights) -> bool:
    """Replace a Cast of stored integers by a float weight of the same numbers, in place.

    A zero point may be subtracted from them.  Only floats that an operator reads as weights are
    replaced, though no Mul scales them.  Call this after :func:`replace_scaled`.  Return whether
    the node was replaced.
    """
    cast: ir.Node | None = node
    zero = None
    if node.op_type == "Sub" and not node.domain:
        cast, zero = take_input(node).producer(), take_input(node, 1)
        known = known_array(zero)
        if known is None or known.size != 1:
            return False
    if cast is None or _find_integers(cast) is None:
        return False
    if not any(is_weight_input(*use) for use in list_uses(node.outputs[0])):
        return False
    builder = NodeBuilder(f"{node.outputs[0].name or node.name}/float")
    one = builder.number(1.0, ir.DataType(cast.attributes["to"].as_int()))
    settings = Settings(scale=one, zero=zero)
    builder.replace(node, [find_floats(builder, node, weights, take_input(cast), settings)])
    return True


def _find_gather(value: ir.Value) -> ir.Node | None:
    """Return the node that reads a value as rows of a matrix, along its first axis."""
    maker = value.producer()
    if maker is None or maker.op_type != "Gather" or maker.domain:
        return None
    table = known_array(take_input(maker))
    is_matrix = table is not None and table.ndim == 2
    return maker if is_matrix and maker.attributes.get_int("axis", 0) in (0, -2) else None


def _find_factors(gather: ir.Node, scale: ir.Value) -> np.ndarray | None:
    """Return what scales the rows and columns of a table, of which ``gather`` reads rows."""
    stored = known_array(scale)
    if stored is not None:
        return stored if stored.ndim < 2 else None
    is_column = False
    maker = scale.producer()
    if maker is not None and maker.op_type == "Unsqueeze" and not maker.domain:
        axes = known_array(take_input(maker, 1)) if len(maker.inputs) > 1 else None
        is_column = axes is not None and axes.tolist() == [-1]
        maker = take_input(maker).producer() if is_column else None
    if maker is None or maker.op_type != "Gather" or maker.domain:
        return None
    rows, table = known_array(take_input(maker)), known_array(take_input(gather))
    if rows is None or table is None or maker.attributes.get_int("axis", 0) != 0:
        return None
    if take_input(maker, 1) is not take_input(gather, 1) or rows.ndim != (1 if is_column else 2):
        return None
    return rows.reshape(len(rows), -1) if len(rows) == len(table) else None


def _find_scaled(node: ir.Node) -> _Scaled | None:
    """Return what a Mul scales, or ``None`` if that is not stored as integers."""
    for whole, scale in (node.inputs, reversed(node.inputs)):
        cast, zero = None if whole is None else whole.producer(), None
        if cast is not None and cast.op_type == "Sub" and not cast.domain:
            zero = take_input(cast, 1)
            cast = take_input(cast).producer()
        if cast is None or scale is None or _find_integers(cast) is None:
            continue
        if known_array(scale) is not None and (zero is None or known_array(zero) is not None):
            return _Scaled(cast=cast, zero=zero, scale=scale)
    return None


def _list_settings(scaled: _Scaled) -> list[ir.Value]:
    return [scaled.scale, *([] if scaled.zero is None else [scaled.zero])]


def _compute(scaled: _Scaled) -> np.ndarray | None:
    """Return the floats, or ``None`` if they have another shape than the integers."""
    integers, settings = known_array(take_input(scaled.cast)), _list_settings(scaled)
    arrays = [array for array in map(known_array, settings) if array is not None]
    assert integers is not None
    if np.broadcast_shapes(integers.shape, *(a.shape for a in arrays)) != integers.shape:
        return None
    scale, *zeros = arrays
    floats: np.ndarray = integers.astype(scale.dtype)
    for zero in zeros:
        floats = floats - zero
    scaled_floats: np.ndarray = floats * scale
    return scaled_floats


def _find_integers(node: ir.Node) -> ir.Value | None:
    """Return the stored matrix of integers of 4 to 16 bits that a node casts to floats.

    Operators that only select or move its elements may come before the Cast.
    """
    if node.op_type != "Cast" or node.domain:
        return None
    value = take_input(node)
    while (maker := value.producer()) is not None and maker.op_type in MOVING and not maker.domain:
        value = take_input(maker)
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype not in NARROW or len(tensor.shape) < 2:
        return None
    return value if ir.DataType(node.attributes["to"].as_int()).is_floating_point() else None


def find_stored_integers(graph: ir.Graph) -> dict[str, int]:
    """Return how many numbers each stored matrix of integers has that is not trained.

    It is cast to floats, computed with, or moved before it is dequantized.
    """
    found = {}
    for node in list_nodes(graph):
        source = _find_integers(node)
        for value in _list_computed(node) if source is None else [source]:
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is not None:
                found[value.name or ""] = tensor.size
    return found


def _list_computed(node: ir.Node) -> list[ir.Value]:
    """Return the stored matrices that a node computes with as integers, or dequantizes moved."""
    if node.domain:
        return []
    operands = [node.inputs[index] for index in _OPERANDS.get(node.op_type, ())]
    if node.op_type == "DequantizeLinear" and not _is_stored(node.inputs[0]):
        operands = [node.inputs[0]]
    found = [value for one in operands if one is not None for value in list_stored(one)]
    return [value for value in found if _is_stored(value)]


def _is_stored(value: ir.Value | None) -> bool:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.dtype in NARROW and len(tensor.shape) > 1


def describe_stored_integers(found: Mapping[str, int]) -> str:
    """Return a sentence about weights stored as integers, which are not trained."""
    return (
        f"{count_stored_integers(found)}; --dequantize makes float weights of those whose "
        "scale is stored, and of those that are weights without a scale"
    )


def count_stored_integers(found: Mapping[str, int]) -> str:
    """Return which weights stored as integers are not trained, without advice."""
    total = sum(found.values())
    return f"{list_some(tuple(found))}: {total:,} quantized numbers are not trained"
