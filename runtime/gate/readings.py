"""Read the nodes of a stage's graph and the names of their values, without the onnx package.

A graph is read only if it passes the checks in :mod:`gates`.  The only attributes that are read are
those of layers, and subgraph bodies: a node with bodies (If, Loop or Scan) is treated as if it read
every value that its bodies mention.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitonnx.errors import ForbiddenGraph
from splitonnx.graph_limits import STAGE
from splitonnx.layers import LAYERS, LayerNode
from splitonnx.runtime.gate import schemas
from splitonnx.runtime.gate.gates import check_graph
from splitonnx.runtime.gate.protobufs import Malformed, Place, Reader, to_signed

_MOST_FIELDS = 5
"""How often each field may be read: in passes over nodes, layers' attributes, and bodies."""


@dataclass(frozen=True, kw_only=True)
class GraphNode:
    """A node of a graph: its name, its operator, and the names of its input and output values.

    ``reads`` also has the values that its bodies mention.  ``layer`` describes its own inputs and
    outputs in their places, and its attributes of integers.
    """

    name: str
    operator: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    layer: LayerNode


def read_nodes(stage: str, content: bytes) -> tuple[GraphNode, ...]:
    """Return the nodes of a stage's graph, in the order in which the graph lists them.

    ``stage`` is the stage's name for error messages, and ``content`` is the serialized graph.

    Raises:
        ForbiddenGraph: the graph is not in ONNX format, or does not pass the checks in
            :mod:`gates`.
    """
    check_graph(stage, content)
    try:
        return tuple(_NodeReader(content).read_model())
    except Malformed as error:
        raise ForbiddenGraph(stage, "the graph", str(error)) from error


class _NodeReader:
    """The reader of one graph's nodes."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._reader = Reader(content, max_fields=_MOST_FIELDS * STAGE.fields)

    def read_model(self) -> list[GraphNode]:
        nodes = []
        for name, start, stop in self._reader.read((0, len(self._content)), schemas.MODEL):
            if name == "graph":
                nodes += [self._read_node(place) for place in self._list_nodes((start, stop))]
        return nodes

    def _list_nodes(self, graph: Place) -> list[Place]:
        fields = self._reader.read(graph, schemas.GRAPH)
        return [(start, stop) for name, start, stop in fields if name == "node"]

    def _read_node(self, place: Place) -> GraphNode:
        texts: dict[str, list[str]] = {}
        attributes: list[Place] = []
        for name, start, stop in self._reader.read(place, schemas.NODE):
            if name == "attribute":
                attributes.append((start, stop))
            elif name in ("argument", "result", "name", "operator"):
                texts.setdefault(name, []).append(self._read_text((start, stop)))
        arguments, results = texts.get("argument", []), texts.get("result", [])
        operator = "".join(texts.get("operator", []))
        reads = [*arguments, *self._list_mentioned(attributes)]
        integers, equation = self._read_attributes(operator, attributes)
        return GraphNode(
            name="".join(texts.get("name", [])),
            operator=operator,
            reads=tuple(dict.fromkeys(filter(None, reads))),
            makes=tuple(filter(None, results)),
            layer=LayerNode(
                operator=operator,
                arguments=tuple(arguments),
                results=tuple(results),
                integers=integers,
                equation=equation,
            ),
        )

    def _read_attributes(
        self, operator: str, attributes: list[Place]
    ) -> tuple[dict[str, list[int]], str]:
        """Read the integers of a layer's attributes, and the equation of an Einsum."""
        integers: dict[str, list[int]] = {}
        equation = ""
        for place in attributes if operator in (*LAYERS, "Transpose") else ():
            name = ""
            numbers: list[int] = []
            for field, start, stop in self._reader.read(place, schemas.ATTRIBUTE):
                if field == "name":
                    name = self._read_text((start, stop))
                elif field == "integers":
                    read = self._reader.read_numbers((start, stop)) if stop else [start]
                    numbers += map(to_signed, read)
                elif field == "string" and operator == "Einsum":
                    equation = self._read_text((start, stop))
            integers[name] = numbers
        return integers, equation

    def _list_mentioned(self, attributes: list[Place]) -> list[str]:
        """List every value that the subgraph bodies in these attributes read or output."""
        mentioned = []
        pending = self._list_bodies(attributes)
        while pending:  # no recursion: deep nesting must not crash the process
            body = pending.pop()
            mentioned += self._list_outputs(body)
            for node in self._list_nodes(body):
                inner: list[Place] = []
                for name, start, stop in self._reader.read(node, schemas.NODE):
                    if name == "argument":
                        mentioned.append(self._read_text((start, stop)))
                    elif name == "attribute":
                        inner.append((start, stop))
                pending += self._list_bodies(inner)
        return mentioned

    def _list_bodies(self, attributes: list[Place]) -> list[Place]:
        return [
            (start, stop)
            for attribute in attributes
            for name, start, stop in self._reader.read(attribute, schemas.ATTRIBUTE)
            if name == "graph"
        ]

    def _list_outputs(self, body: Place) -> list[str]:
        """List the outputs of a body; one of them may be a value of the enclosing graph."""
        return [
            self._read_text((at, end))
            for name, start, stop in self._reader.read(body, schemas.GRAPH)
            if name == "output"
            for field, at, end in self._reader.read((start, stop), schemas.VALUE)
            if field == "name"
        ]

    def _read_text(self, place: Place) -> str:
        return self._reader.read_text(place, STAGE.name_bytes)
