"""Divide a stage graph into what the other party waits for, and the rest.

The other party continues as soon as it has the gradient of what it sent.  The gradients of this
party's weights can follow (the two parts of a backward pass that arXiv 2401.10241, "Zero bubble
pipeline parallelism", tells apart).  Each node stays as it is, so the bits are those of the whole
graph.  Nothing here knows of parties.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph, PlacedNode
from splitonnx.runtime.engine.layouts.graph_pieces import CODES, declare, write_piece
from splitonnx.runtime.gate.protobufs import Place

COSTLY = frozenset(
    {"Conv", "ConvGrad", "ConvTranspose", "Einsum", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"}
)
"""Operators that take so long that what does not need them should not wait for them."""


class _Node(Protocol):
    @property
    def operator(self) -> str: ...
    @property
    def arguments(self) -> Sequence[str]: ...
    @property
    def results(self) -> Sequence[str]: ...


@dataclass(frozen=True, kw_only=True)
class OpenedHalves:
    """The sessions of a divided graph, and what the first one hands on."""

    first: Any
    rest: Any
    handed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GraphHalves:
    """The graph that runs first, and what it gives.

    ``outputs`` are those of the whole graph that it has, and ``handed`` are the values that it
    hands on; some may be both.
    """

    first: bytes
    outputs: tuple[str, ...]
    handed: tuple[str, ...]
    _graph: PlacedGraph
    _ahead: frozenset[Place]

    def open(self, open_graph: Callable[[bytes], Any]) -> Any:
        """Open both graphs in ONNX Runtime, which knows the types of what is handed on.

        Returns:
            Their sessions as :class:`OpenedHalves`; or that of the whole graph, if something that
            would be handed on has a type that tensors between stages do not have.
        """
        first = open_graph(self.first)
        types = {output.name: output.type for output in first.get_outputs()}
        if not all(types[name] in CODES for name in self.handed):
            return open_graph(self._graph.content)
        rest = open_graph(self.write_rest(types))
        return OpenedHalves(first=first, rest=rest, handed=self.handed)

    def write_rest(self, types: Mapping[str, str]) -> bytes:
        """Return the graph that runs then, with ONNX Runtime's names of the types of values."""
        fields = [
            (name, self._graph.content[start:stop])
            for name, start, stop in self._graph.fields
            if (start, stop) not in self._ahead and name != "output"
        ]
        fields += [("input", declare(self._graph, name, types)) for name in self.handed]
        others = (name for name in self._graph.outputs if name not in self.outputs)
        fields += [("output", declare(self._graph, name)) for name in others]
        return write_piece(self._graph, fields)


def find_first(nodes: Sequence[_Node], early: Collection[str]) -> frozenset[int]:
    """Return the numbers of the nodes that outputs ``early`` need.

    There are none if none of the others is costly, so that dividing gains nothing.
    """
    needed = set(early)
    first = set[int]()
    for number in reversed(range(len(nodes))):
        if needed.intersection(nodes[number].results):
            needed.update(name for name in nodes[number].arguments if name)
            first.add(number)
    others = (node for number, node in enumerate(nodes) if number not in first)
    return frozenset(first if any(node.operator in COSTLY for node in others) else ())


def divide(graph: PlacedGraph, early: Collection[str]) -> GraphHalves | None:
    """Divide a graph so that outputs ``early`` come first; ``None`` if that gains nothing."""
    first = frozenset[int]() if graph.has_bodies else find_first(graph.nodes, early)
    if not first:
        return None
    ahead, behind = list[PlacedNode](), list[PlacedNode]()
    for number, node in enumerate(graph.nodes):
        if node.operator != "Constant":  # both have all constants
            (ahead if number in first else behind).append(node)
    made = {name for node in ahead for name in node.results if name}
    read = {name for node in behind for name in node.arguments}
    outputs = tuple(name for name in graph.outputs if name in made)
    handed = tuple(name for node in ahead for name in node.results if name in read and name)
    later = {node.place for node in behind}
    fields = [
        (name, graph.content[start:stop])
        for name, start, stop in graph.fields
        if (start, stop) not in later and name != "output"
    ]
    fields += [("output", declare(graph, name)) for name in dict.fromkeys(outputs + handed)]
    return GraphHalves(
        first=write_piece(graph, fields),
        outputs=outputs,
        handed=handed,
        _graph=graph,
        _ahead=frozenset(node.place for node in ahead),
    )
