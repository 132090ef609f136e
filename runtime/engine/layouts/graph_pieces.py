"""Write graphs that consist of fields of a stage graph, and declare the values between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from splitonnx.element_types import ELEMENT_TYPES
from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph
from splitonnx.runtime.engine.layouts.messages import write_model, write_value

CODES = {kind.runtime: kind.code for kind in ELEMENT_TYPES}
"""ONNX's numbers of the types of tensors between stages, by ONNX Runtime's names."""


def write_piece(graph: PlacedGraph, fields: Iterable[tuple[str, bytes]]) -> bytes:
    """Return a model with these fields, each with its name, and the operator sets of ``graph``."""
    opsets = [graph.content[start:stop] for start, stop in graph.opsets]
    return write_model(graph.ir_version, opsets, fields)


def declare(graph: PlacedGraph, name: str, types: Mapping[str, str] = {}) -> bytes:
    """Return the declaration of a value as the graph has it, or with its type, if that is known.

    ``types`` has ONNX Runtime's names of types.  What has no type may only be an output.
    """
    if place := graph.declared.get(name):
        return graph.content[slice(*place)]
    return write_value(name, None, code=CODES[types[name]] if name in types else None)
