"""Find weights stored as integers that are dequantized in a way that does not let them be trained.

A weight becomes a float weight only if DequantizeLinear nodes alone read it, all with one constant
scale.  :mod:`stored` finds the others that ``--dequantize`` may turn into floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from splitonnx.partitioner.graphs.traversals import list_nodes
from splitonnx.partitioner.normalization.dequantized.stored import (
    count_stored_integers,
    find_stored_integers,
)
from splitonnx.partitioner.normalization.quantizations import NARROW, can_lift

_BETWEEN_FLOATS = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
"""Operators that have floats before or behind them."""


def find_untrained_integers(graph: ir.Graph) -> dict[str, int]:
    """Return how many numbers each stored matrix of integers has that can only stay as it is.

    Nodes with other settings dequantize it as well, or its scale is computed, or an operator such
    as Split or Pad reads it before it is dequantized, or it is dequantized in the body of an If,
    Loop or Scan.
    """
    known = find_stored_integers(graph)
    found = {}
    for node in list_nodes(graph):
        if node.op_type != "DequantizeLinear" or node.domain or not node.inputs:
            continue
        if node.graph is graph and can_lift(node):
            continue
        for value in _list_sources(node.inputs[0], set()):
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is not None and value.name not in known:
                found[value.name or ""] = tensor.size
    return found


def _list_sources(value: ir.Value | None, seen: set[ir.Value]) -> Iterator[ir.Value]:
    """Yield the stored matrices of integers that a value is made of, itself if it is one."""
    if value is None or value in seen:
        return
    seen.add(value)
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        if tensor.dtype in NARROW and len(tensor.shape) > 1:
            yield value
        return
    maker = value.producer()
    if maker is not None and maker.op_type not in _BETWEEN_FLOATS and not _makes_floats(maker):
        for part in maker.inputs:
            yield from _list_sources(part, seen)


def _makes_floats(node: ir.Node) -> bool:
    kind = node.attributes.get_int("to", 0) if node.op_type == "Cast" else 0
    return bool(kind) and ir.DataType(kind).is_floating_point()


def describe_untrained_integers(found: Mapping[str, int]) -> str:
    """Return a sentence about weights stored as integers that can only stay as they are."""
    return (
        f"{count_stored_integers(found)}, since a weight is trained only if DequantizeLinear alone "
        "reads it, with one stored scale and not in the body of another node: export it again with "
        "a weight for each scale, and with DequantizeLinear before operators such as Split and Pad"
    )
