"""Divide a stage graph into what depends on steady inputs alone, and the rest.

The gradient of a convolution's input needs the weights turned and mirrored, and images in blocks
need them in blocks.  In a step of several micro-batches that gives the same for each of them.
Compilers call this loop-invariant code motion.  Only nodes that move values to other places are
taken out, so the bits are those of the whole graph.  Nothing here knows of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from splitonnx.runtime.engine.layouts.convolutions import DOMAIN
from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph, PlacedNode
from splitonnx.runtime.engine.layouts.graph_pieces import write_piece
from splitonnx.runtime.engine.layouts.messages import write_value

MOVES = frozenset(
    {("", "Gather"), ("", "Reshape"), ("", "Slice"), ("", "Transpose"), (DOMAIN, "ReorderInput")}
)
"""Operators, with their domains, whose output has the values of their first input."""
SMALLEST = 1 << 12
"""Elements of a steady input from which moving its values costs more than handing a tensor on."""


@dataclass(frozen=True, kw_only=True)
class GraphDivision:
    """The two graphs, the steady inputs that the first one reads, and what it hands on."""

    invariant: bytes
    rest: bytes
    reads: tuple[str, ...]
    handed: tuple[str, ...]


def divide(graph: PlacedGraph, steady: Collection[str]) -> GraphDivision | None:
    """Divide a graph; ``None`` if nothing in it depends on the inputs ``steady`` alone.

    All inputs of the graph are inputs of the rest, too, and all its outputs are the rest's.
    """
    if graph.has_bodies:
        return None
    constants = {node.results[0]: node for node in graph.nodes if _is_constant(node)}
    fixed = set(constants) | set(graph.initializers)
    large = {
        name
        for name in graph.inputs
        if name in steady
        and name in graph.shapes
        and math.prod(graph.all_shapes.get(name, (0,))) >= SMALLEST
    }
    known, moved = set(large), list[PlacedNode]()
    for node in graph.nodes:
        if _is_move(node, known, fixed) and node.results[0] not in graph.outputs:
            known.add(node.results[0])
            moved.append(node)
    if not moved:
        return None
    places = {node.place for node in moved}
    others = [node for node in graph.nodes if node.place not in places]
    needed = {name for node in others for name in node.arguments}
    read = {name for node in moved for name in node.arguments}
    handed = tuple(node.results[0] for node in moved if node.results[0] in needed)
    reads = tuple(name for name in graph.inputs if name in read)
    kept = places | {node.place for name, node in constants.items() if name in read}
    kept |= {place for name, place in graph.initializers.items() if name in read}
    return GraphDivision(
        invariant=_write_invariant(graph, kept, reads, handed),
        rest=_write_rest(graph, places, handed),
        reads=reads,
        handed=handed,
    )


def find_origins(graph: PlacedGraph, steady: Collection[str]) -> dict[str, str]:
    """Map each value that is kept between runs to the steady input whose values it has."""
    division = divide(graph, steady)
    makers = {name: node for node in graph.nodes for name in node.results}
    origins = {name: name for name in (division.handed if division else ())}
    for name in origins:
        while (origin := origins[name]) in makers:
            origins[name] = makers[origin].argument(0)
    return origins


def _is_constant(node: PlacedNode) -> bool:
    return node.operator == "Constant" and not node.domain and len(node.results) == 1


def _is_move(node: PlacedNode, known: set[str], fixed: set[str]) -> bool:
    """Return whether a node moves known values to places that are the same in each run."""
    return (
        (node.domain, node.operator) in MOVES
        and len(node.results) == 1
        and node.argument(0) in known
        and all(name in fixed or not name for name in node.arguments[1:])
    )


def _write_invariant(
    graph: PlacedGraph,
    kept: Collection[tuple[int, int]],
    reads: Collection[str],
    handed: Collection[str],
) -> bytes:
    labels = iter(graph.inputs)
    fields: list[tuple[str, bytes]] = [("name", b"invariant")]
    for name, start, stop in graph.fields:
        is_read = name == "input" and next(labels) in reads
        if is_read or (start, stop) in kept:
            fields.append((name, graph.content[start:stop]))
    fields += [("output", write_value(name, None)) for name in handed]
    return write_piece(graph, fields)


def _write_rest(
    graph: PlacedGraph, moved: Collection[tuple[int, int]], handed: Collection[str]
) -> bytes:
    # with the shapes that are declared, as onnxruntime-training crashes on some nodes without
    fields = [
        (name, graph.content[start:stop])
        for name, start, stop in graph.fields
        if (start, stop) not in moved
    ]
    fields += [("input", write_value(name, graph.all_shapes.get(name))) for name in handed]
    return write_piece(graph, fields)
