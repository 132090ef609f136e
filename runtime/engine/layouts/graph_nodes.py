"""Read the nodes of a stage graph with their attributes, and the declared shapes of its values.

Each node is kept with the place of its bytes, so that it can be written again as it was.  Only
graphs that have passed the gate are read, and only their outermost nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from splitonnx.graph_limits import STAGE
from splitonnx.runtime.gate import schemas
from splitonnx.runtime.gate.protobufs import Place, Reader, to_signed

_MOST_FIELDS = 3
"""How often each field may be read."""
_LONGEST = 1024
"""Most bytes of a list of numbers that is read."""
_FLOAT, _INT64 = 1, 7

Shape = tuple[int | None, ...]
"""Dimensions, each ``None`` if it is not fixed."""


@dataclass(frozen=True, kw_only=True)
class PlacedNode:
    """A node, the ``place`` of its bytes, and those of its attributes.

    ``integers`` has the numbers of each attribute that holds any.
    """

    place: Place
    name: str
    operator: str
    domain: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    attributes: tuple[Place, ...]
    integers: dict[str, tuple[int, ...]]

    def argument(self, position: int) -> str:
        """Return the name of an input, or ``""`` if the node has fewer."""
        return self.arguments[position] if position < len(self.arguments) else ""


class PlacedGraph:
    """A stage's graph, field by field.

    ``opsets`` are the places of the operator sets' bytes within ``content``, and ``fields`` those
    of the graph's fields, each with its name.  ``inputs`` and ``outputs`` are the graph's, in
    order.  ``shapes`` are the declared ones of float32 values, ``all_shapes`` those of values of
    any type whose dimensions are all fixed.  ``constants`` are one-dimensional lists of 64-bit
    integers; ``declared`` and ``initializers`` are the places of declarations and of tensors, by
    name.  ``uses`` counts how often nodes
    and outputs mention a value; ``has_bodies`` is true if bodies might mention more.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self._reader = Reader(content, max_fields=_MOST_FIELDS * STAGE.fields)
        model = list(self._reader.read((0, len(content)), schemas.MODEL))
        self.ir_version = next((number for name, number, _ in model if name == "ir_version"), 0)
        self.opsets = [(start, stop) for name, start, stop in model if name == "opset"]
        graph = next(((start, stop) for name, start, stop in model if name == "graph"), (0, 0))
        self.fields = list(self._reader.read(graph, schemas.GRAPH))
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.shapes: dict[str, Shape] = {}
        self.all_shapes: dict[str, tuple[int, ...]] = {}
        self.constants: dict[str, tuple[int, ...]] = {}
        self.declared: dict[str, Place] = {}
        self.initializers: dict[str, Place] = {}
        self.uses: Counter[str] = Counter()
        self.has_bodies = False
        self.nodes: list[PlacedNode] = []
        for name, *place in self.fields:
            self._read_field(name, (place[0], place[1]))

    def _read_field(self, name: str, place: Place) -> None:
        if name == "node":
            node = self._read_node(place)
            self.nodes.append(node)
            self.uses.update(node.arguments)
        elif name == "initializer":
            self.initializers[self._read_tensor(place)] = place
        elif name in ("input", "output", "value"):
            label = self._read_value(place)
            if name == "output":
                self.outputs.append(label)
                self.uses[label] += 1
            elif name == "input":
                self.inputs.append(label)

    def _read_node(self, place: Place) -> PlacedNode:
        texts: dict[str, list[str]] = {}
        attributes: list[Place] = []
        for name, start, stop in self._reader.read(place, schemas.NODE):
            if name == "attribute":
                attributes.append((start, stop))
            elif name in ("argument", "result", "name", "operator", "domain"):
                text = self._reader.read_text((start, stop), STAGE.name_bytes)
                texts.setdefault(name, []).append(text)
        operator, results = "".join(texts.get("operator", [])), tuple(texts.get("result", []))
        constant = results[0] if operator == "Constant" and results else None
        return PlacedNode(
            place=place,
            name="".join(texts.get("name", [])),
            operator=operator,
            domain="".join(texts.get("domain", [])),
            arguments=tuple(texts.get("argument", [])),
            results=results,
            attributes=tuple(attributes),
            integers=dict(self._read_attributes(attributes, constant)),
        )

    def _read_attributes(
        self, attributes: list[Place], constant: str | None
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        for place in attributes:
            label, numbers = "", list[int]()
            for name, start, stop in self._reader.read(place, schemas.ATTRIBUTE):
                if name == "name":
                    label = self._reader.read_text((start, stop), STAGE.name_bytes)
                elif name == "integers":
                    numbers += map(to_signed, self._list_numbers(start, stop))
                elif name == "graph":
                    self.has_bodies = True
                elif name == "tensor" and constant is not None:
                    self._read_tensor((start, stop), constant)
            yield label, tuple(numbers)

    def _read_tensor(self, place: Place, label: str = "") -> str:
        dims: list[int] = []
        numbers: list[int] = []
        dtype = 0
        for name, start, stop in self._reader.read(place, schemas.TENSOR):
            if name == "dims":
                dims += self._list_numbers(start, stop)
            elif name == "dtype":
                dtype = start
            elif name == "name":
                label = label or self._reader.read_text((start, stop), STAGE.name_bytes)
            elif name == "int64_data":
                numbers += map(to_signed, self._list_numbers(start, stop))
            elif name == "raw_data" and dtype == _INT64 and stop - start <= _LONGEST:
                numbers += np.frombuffer(self.content[start:stop], "<i8").tolist()
        self._note_shape(label, dtype, tuple(dims))
        if dtype == _INT64 and len(dims) == 1:
            self.constants[label] = tuple(numbers)
        return label

    def _list_numbers(self, start: int, stop: int) -> list[int]:
        return list(self._reader.read_numbers((start, stop))) if stop else [start]

    def _read_value(self, place: Place) -> str:
        label = ""
        for name, start, stop in self._reader.read(place, schemas.VALUE):
            if name == "name":
                label = self._reader.read_text((start, stop), STAGE.name_bytes)
            elif name == "type":
                self.declared[label] = place
                for kind, *tensor in self._reader.read((start, stop), schemas.TYPE):
                    if kind == "tensor":
                        self._read_type(label, (tensor[0], tensor[1]))
        return label

    def _read_type(self, label: str, place: Place) -> None:
        dtype, shape = 0, None
        for name, start, stop in self._reader.read(place, schemas.TENSOR_TYPE):
            if name == "dtype":
                dtype = start
            else:
                entries = list(self._reader.read((start, stop), schemas.SHAPE))
                shape = tuple(self._read_dimension((a, b)) for _, a, b in entries)
        if shape is not None:
            self._note_shape(label, dtype, shape)

    def _note_shape(self, label: str, dtype: int, shape: Shape) -> None:
        fixed = tuple(size for size in shape if size is not None)
        if len(fixed) == len(shape):
            self.all_shapes[label] = fixed
        if dtype == _FLOAT:
            self.shapes[label] = shape

    def _read_dimension(self, place: Place) -> int | None:
        found = list(self._reader.read(place, schemas.DIMENSION))
        return next((start for name, start, _ in found if name == "size"), None)
