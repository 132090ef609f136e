"""The declarations in a stage's graph: the shapes of its values, and which nodes make and use them.

Graphs that passed the gate are parsed by hand, like in the gate, without the onnx package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from splitonnx.graph_limits import STAGE
from splitonnx.runtime.gate import schemas
from splitonnx.runtime.gate.protobufs import Place, Reader

_UNTYPED = 32
"""Bits of an element whose type is not declared."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The size of a value: bits per element, and dimensions as numbers or names.

    ``dims`` is ``None`` if nothing is declared; an unknown dimension is ``""``.
    """

    bits: int
    dims: tuple[int | str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node: its operator, and the names of its inputs and outputs; ``""`` for omitted ones.

    ``captured`` are the outer values that the bodies of an If, Loop or Scan use; ``has_body`` is
    true if there are such bodies.
    """

    operator: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    captured: frozenset[str]
    has_body: bool


@dataclass(frozen=True, kw_only=True)
class StageGraph:
    """A graph's values by name, its nodes in the order of execution, its inputs and outputs.

    ``constants`` are the values stored in the graph.
    """

    values: Mapping[str, Extent]
    nodes: Sequence[Node]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: frozenset[str]


def order_nodes(nodes: Sequence[Node]) -> list[Node]:
    """Sort nodes into the order in which ONNX Runtime runs them: depth first, from the last leaf.

    A leaf is a node whose outputs are no other node's inputs; of several inputs, the one whose node
    comes last in the graph is visited first.  (Source: GraphViewer and Graph::ReverseDFSFrom,
    1.19.2.)
    """
    makers = {name: index for index, node in enumerate(nodes) for name in node.results if name}
    sources = [
        sorted({makers[n] for n in (*node.arguments, *node.captured) if n in makers})
        for node in nodes
    ]
    used = {source for own in sources for source in own}
    pending = [(index, False) for index in range(len(nodes)) if index not in used]
    seen: set[int] = set()
    order = []
    while pending:
        index, is_done = pending.pop()
        if is_done:
            order.append(nodes[index])
        elif index not in seen:
            seen.add(index)
            pending.append((index, True))
            pending += [(source, False) for source in sources[index] if source not in seen]
    return order


def read_stage(graph: bytes) -> StageGraph:
    """Parse a stage's graph that has passed the gate.

    Raises:
        Malformed: the bytes are not a graph.
    """
    return _GraphReader(graph).read()


class _GraphReader:
    def __init__(self, content: bytes) -> None:
        self._content = content[: STAGE.total_bytes]
        self._reader = Reader(self._content, max_fields=STAGE.fields)
        self._values: dict[str, Extent] = {}
        self._constants: set[str] = set()

    def read(self) -> StageGraph:
        nodes: list[Node] = []
        names: dict[str, list[str]] = {"input": [], "output": []}
        for model_field, *graph in self._reader.read((0, len(self._content)), schemas.MODEL):
            if model_field != "graph":
                continue
            for name, *place in self._reader.read((graph[0], graph[1]), schemas.GRAPH):
                here = (place[0], place[1])
                if name == "node":
                    nodes.append(self._read_node(here))
                elif name == "initializer":
                    label, extent = self._read_tensor(here)
                    self._values[label] = extent
                    self._constants.add(label)
                elif name in ("input", "output", "value"):
                    label, extent = self._read_value(here)
                    names.setdefault(name, []).append(label)
                    if extent.dims is not None or label not in self._values:
                        self._values[label] = extent
        return StageGraph(
            values=self._values,
            nodes=order_nodes(nodes),
            inputs=tuple(names["input"]),
            outputs=tuple(names["output"]),
            constants=frozenset(self._constants),
        )

    def _read_node(self, place: Place) -> Node:
        arguments: list[str] = []
        results: list[str] = []
        captured: set[str] = set()
        operator, has_body = "", False
        held: Extent | None = None
        for name, start, stop in self._reader.read(place, schemas.NODE):
            here = (start, stop)
            if name == "argument":
                arguments.append(self._read_name(here))
            elif name == "result":
                results.append(self._read_name(here))
            elif name == "operator":
                operator = self._read_name(here)
            elif name == "attribute":
                for kind, *inner in self._reader.read(here, schemas.ATTRIBUTE):
                    if kind == "graph":
                        has_body = True
                        captured.update(self._list_arguments((inner[0], inner[1])))
                    elif kind == "tensor" and operator == "Constant":
                        _, held = self._read_tensor((inner[0], inner[1]))
        if operator == "Constant" and results:
            self._constants.add(results[0])
            self._values[results[0]] = held or Extent(bits=_UNTYPED, dims=())
        return Node(
            operator=operator,
            arguments=tuple(arguments),
            results=tuple(results),
            captured=frozenset(captured),
            has_body=has_body,
        )

    def _list_arguments(self, body: Place) -> Iterator[str]:
        """List the values that a body's nodes and nested bodies use, and its outputs."""
        pending = [body]
        while pending:
            for name, *place in self._reader.read(pending.pop(), schemas.GRAPH):
                if name == "output":
                    yield self._read_value((place[0], place[1]))[0]
                if name != "node":
                    continue
                for kind, *inner in self._reader.read((place[0], place[1]), schemas.NODE):
                    if kind == "argument":
                        yield self._read_name((inner[0], inner[1]))
                    elif kind == "attribute":
                        fields = self._reader.read((inner[0], inner[1]), schemas.ATTRIBUTE)
                        pending += [(a, b) for label, a, b in fields if label == "graph"]

    def _read_tensor(self, place: Place) -> tuple[str, Extent]:
        label, bits = "", _UNTYPED
        dims: list[int | str] = []
        for name, start, stop in self._reader.read(place, schemas.TENSOR):
            if name == "dims":
                dims += self._reader.read_numbers((start, stop)) if stop else (start,)
            elif name == "dtype":
                bits = _count_bits(start)
            elif name == "name":
                label = self._read_name((start, stop))
        return label, Extent(bits=bits, dims=tuple(dims))

    def _read_value(self, place: Place) -> tuple[str, Extent]:
        label, extent = "", Extent(bits=_UNTYPED, dims=None)
        for name, *inner in self._reader.read(place, schemas.VALUE):
            if name == "name":
                label = self._read_name((inner[0], inner[1]))
            elif name == "type":
                for kind, *tensor in self._reader.read((inner[0], inner[1]), schemas.TYPE):
                    if kind == "tensor":
                        extent = self._read_type((tensor[0], tensor[1]))
        return label, extent

    def _read_type(self, place: Place) -> Extent:
        bits, dims = _UNTYPED, None
        for name, start, stop in self._reader.read(place, schemas.TENSOR_TYPE):
            if name == "dtype":
                bits = _count_bits(start)
            else:
                entries = self._reader.read((start, stop), schemas.SHAPE)
                dims = tuple(self._read_dimension((a, b)) for _, a, b in entries)
        return Extent(bits=bits, dims=dims)

    def _read_dimension(self, place: Place) -> int | str:
        for name, start, stop in self._reader.read(place, schemas.DIMENSION):
            if name == "size":
                return start
            if name == "symbol":
                return self._read_name((start, stop))
        return ""

    def _read_name(self, place: Place) -> str:
        return self._reader.read_text(place, STAGE.name_bytes)


def _count_bits(dtype: int) -> int:
    """Count the bits of an element as it is computed with: 16-bit floats are widened beside."""
    bits = schemas.DTYPES.get(dtype, (_UNTYPED, ""))[0] or _UNTYPED
    return 48 if dtype in _HALVES else bits


_HALVES = frozenset({10, 16})
"""float16 and bfloat16."""
