"""A parser for the nodes of stage graphs, and for the declared shapes of their values.

The parser is used only for graphs that have passed the gate.  Like the gate, it does not need the
onnx package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from splitonnx.graph_limits import STAGE
from splitonnx.runtime.gate import schemas
from splitonnx.runtime.gate.protobufs import Place, Reader

_UNTYPED = 32
"""Bits that are assumed for an element whose type is not declared."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The declared size of a value: its bits per element and its dimensions.

    Each dimension is a number, a name, or ``""`` if it is unknown.  ``dims`` is ``None`` if the
    graph does not declare a shape.
    """

    bits: int
    dims: tuple[int | str, ...] | None


@dataclass(frozen=True, kw_only=True)
class OperatorKernel:
    """An operator that a graph in ORT format (ONNX Runtime's own file format) needs.

    ``version`` is the opset that defined the operator.  ``types`` lists the element types that the
    operator is used with, as JSON for ONNX Runtime's build scripts; the text is empty if a reduced
    build cannot leave out types of this operator.
    """

    domain: str
    version: int
    operator: str
    types: str


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of a graph: its operator, and the names of its inputs and outputs.

    The name of an omitted input or output is ``""``.  ``has_body`` is true for If, Loop and Scan
    nodes, and ``captured`` names the values of enclosing graphs that their subgraphs use.
    """

    operator: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    captured: frozenset[str]
    has_body: bool


@dataclass(frozen=True, kw_only=True)
class StageGraph:
    """The contents of a stage's graph.

    ``values`` maps the name of each value to its declared size.  ``nodes`` are in the order in
    which they run.  ``constants`` are the names of values that are stored in the graph.
    """

    values: Mapping[str, Extent]
    nodes: Sequence[Node]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: frozenset[str]


def order_nodes(nodes: Sequence[Node]) -> list[Node]:
    """Sort nodes into the order in which ONNX Runtime runs them.

    ONNX Runtime searches depth-first, starting from the last node whose outputs no other node uses.
    Among the nodes that compute a node's inputs, the search first visits the one that is listed
    last in the graph.  (Source: GraphViewer and Graph::ReverseDFSFrom in version 1.19.2.)
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
    """Parse a stage's graph that has already passed the gate.

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
        """Yield the names of all values that a body and its nested bodies use or return."""
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
    """Return the bits that an element takes during computation.

    For a 16-bit float this includes a 32-bit copy beside it.
    """
    bits = schemas.DTYPES.get(dtype, (_UNTYPED, ""))[0] or _UNTYPED
    return 48 if dtype in _HALVES else bits


_HALVES = frozenset({10, 16})
"""The element types float16 and bfloat16."""
