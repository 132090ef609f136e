"""Divide a stage graph into a trunk, and parts that can run side by side after it.

The gradient of a convolution's weights is a leaf of a backward pass: it needs the gradient of the
layer's output, and nothing in the pass needs it.  Its kernel is hardly faster with more threads.

The kernel's bits depend on the number of threads that it is given.  Therefore which nodes are taken
out depends on these nodes alone, so that the bits are the same wherever a model is cut.  Nothing
here knows of parameters.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph, PlacedNode
from splitonnx.runtime.engine.layouts.graph_pieces import CODES, declare, write_piece
from splitonnx.runtime.engine.layouts.messages import write_node

LEAST = 1 << 17
"""Products for each sample from which a gradient is worth a session of its own."""
_Nodes = Sequence[PlacedNode]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Nodes, the values that they read from elsewhere, and those that are read elsewhere."""

    nodes: tuple[PlacedNode, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ParallelDivision:
    """The parts of ``graph``, and its trunk, which is ``None`` if they need no other nodes."""

    graph: PlacedGraph
    trunk: Piece | None
    parts: tuple[Piece, ...]


def divide(given: PlacedGraph) -> ParallelDivision | None:
    """Divide a graph; ``None`` if nothing in it is worth a thread of its own."""
    if given.has_bodies or any(name in given.initializers for name in given.outputs):
        return None
    graph = separate_gradients(given)
    groups = _find_groups(graph)
    if not groups:
        return None
    aside = {node.place for group in groups for node in group}
    rest = [n for n in graph.nodes if n.place not in aside and not _is_copied(graph, n)]
    trunk, *parts = _describe(graph, [rest, *groups])
    return ParallelDivision(graph=graph, trunk=trunk if trunk.makes else None, parts=tuple(parts))


def separate_gradients(graph: PlacedGraph) -> PlacedGraph:
    """Return the graph with two nodes for each that computes both gradients of a convolution."""
    if not any(_has_both(graph, node) for node in graph.nodes):
        return graph
    content, nodes = graph.content, iter(graph.nodes)
    fields: list[tuple[str, bytes]] = []
    for name, start, stop in graph.fields:
        if name == "node" and _has_both(graph, node := next(nodes)):
            attributes = [content[a:b] for a, b in node.attributes]
            for results in (node.results[:1], ("", node.results[1])):
                written = write_node(
                    node.operator,
                    node.arguments,
                    *results,
                    name=node.name,
                    domain=node.domain,
                    attributes=attributes,
                )
                fields.append((name, written))
        else:
            fields.append((name, content[start:stop]))
    return PlacedGraph(write_piece(graph, fields))


def count_products(graph: PlacedGraph, node: PlacedNode) -> int:
    """Count the products of a gradient of weights for one sample; 0 for other nodes.

    Dimensions that the graph leaves open count as 1.
    """
    if (node.domain, node.operator) != ("com.microsoft", "ConvGrad") or len(node.results) < 2:
        return 0
    _, _, *points = graph.shapes.get(node.argument(0)) or (None, None)
    weights = graph.shapes.get(node.argument(2)) or (0,)
    return math.prod(extent or 1 for extent in (*weights, *points)) if any(weights) else 0


def write_part(graph: PlacedGraph, piece: Piece, types: Mapping[str, str]) -> bytes | None:
    """Return the model of a piece.

    ``types`` has ONNX Runtime's names of the types of what the trunk makes.  ``None``: what it
    reads has a type that cannot be declared.
    """
    content = graph.content
    if any(name not in graph.declared and types.get(name) not in CODES for name in piece.reads):
        return None
    read = {name for node in piece.nodes for name in node.arguments}
    made = {name for node in piece.nodes for name in node.results}
    copied = [n for n in graph.nodes if _is_constant(n) and n.results[0] in read - made]
    held = [place for name, place in graph.initializers.items() if name in read]
    # declared shapes are kept, as onnxruntime-training crashes on some nodes without them
    inner = (read | made) - {*piece.reads, *piece.makes} - graph.initializers.keys()
    fields = [("name", b"piece")]
    fields += [("node", content[slice(*node.place)]) for node in (*copied, *piece.nodes)]
    fields += [("initializer", content[slice(*place)]) for place in held]
    fields += [("value", content[slice(*graph.declared[n])]) for n in graph.declared if n in inner]
    fields += [("input", declare(graph, name, types)) for name in piece.reads]
    fields += [("output", declare(graph, name, {})) for name in piece.makes]
    return write_piece(graph, fields)


def _has_both(graph: PlacedGraph, node: PlacedNode) -> bool:
    return len(node.results) == 2 and all(node.results) and count_products(graph, node) >= LEAST


def _find_groups(graph: PlacedGraph) -> list[list[PlacedNode]]:
    """Find the nodes that nothing but one output of the graph needs, where they take long."""
    ends: dict[str, set[str | None]] = defaultdict(set)
    for name in graph.outputs:
        ends[name].add(name)
    groups: dict[str, list[PlacedNode]] = defaultdict(list)
    for node in reversed(graph.nodes):
        if _is_constant(node):
            continue
        found = {end for name in node.results if name for end in ends[name]}
        end = found.pop() if len(found) == 1 else None
        for name in node.arguments:
            ends[name].add(end)
        if end is not None:
            groups[end].append(node)
    large = (group for group in groups.values() if _sum_products(graph, group) >= LEAST)
    return [group[::-1] for group in large]


def _sum_products(graph: PlacedGraph, nodes: _Nodes) -> int:
    return sum(count_products(graph, node) for node in nodes)


def _describe(graph: PlacedGraph, pieces: Sequence[_Nodes]) -> tuple[Piece, ...]:
    fixed = {name for node in graph.nodes if _is_constant(node) for name in node.results}
    fixed |= graph.initializers.keys()
    read = [dict.fromkeys(n for node in piece for n in node.arguments if n) for piece in pieces]
    made = [dict.fromkeys(n for node in piece for n in node.results if n) for piece in pieces]
    needed = Counter(graph.outputs)
    for names, own in zip(read, made, strict=True):
        needed.update(names.keys() - own.keys() - fixed)
    return tuple(
        Piece(
            nodes=tuple(piece),
            reads=tuple(name for name in names if name not in own and name not in fixed),
            makes=tuple(name for name in own if needed[name]),
        )
        for piece, names, own in zip(pieces, read, made, strict=True)
    )


def _is_constant(node: PlacedNode) -> bool:
    return node.operator == "Constant" and not node.domain


def _is_copied(graph: PlacedGraph, node: PlacedNode) -> bool:
    """Return whether a node is a constant that each piece has for itself."""
    return _is_constant(node) and node.results[0] not in graph.outputs
