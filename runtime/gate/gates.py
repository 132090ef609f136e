"""The gate: a check that a stage's graph must pass before ONNX Runtime loads it.

If a graph refers to external data, ONNX Runtime 1.19.2 opens any file and reads any memory address
that the graph names.  Some other graphs crash the process.  Therefore, ONNX Runtime is given only
graphs like those that ``splitonnx cut`` writes: known operators of known domains, tensors whose
data match their declarations, no external data, no functions, and limited sizes and nesting.  The
bytes are read in one pass, without the onnx package.

The gate does not check whether shapes and types fit together, or how much time and memory the graph
takes to run.  A small graph can still request a large tensor, or run forever.  Some graphs with
inconsistent ranks still crash ONNX Runtime's shape inference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import NoReturn

from splitonnx import operators
from splitonnx.errors import ForbiddenGraph
from splitonnx.graph_limits import STAGE
from splitonnx.runtime.gate import schemas
from splitonnx.runtime.gate.protobufs import Malformed, Place, Reader, to_signed

_LONGEST_KEPT = 256
"""Most bytes of a name, type or attribute that is cached, so that it is checked only once."""
_MOST_KEPT = 1 << 14
"""Most entries of each cache."""


def check_graph(stage: str, content: bytes) -> None:
    """Check the bytes of a stage's graph, and refuse a graph that could harm the process.

    ``stage`` is the stage's name for the error message.  The check takes time proportional to the
    number of fields in the graph's message, which is at most ``STAGE.fields``.  It needs little
    memory.

    Raises:
        ForbiddenGraph: the graph is not like those that ``splitonnx cut`` writes.
    """
    gate = _Gate(stage, content)
    if len(content) > STAGE.total_bytes:
        gate.refuse(f"it takes {len(content)} bytes")
    if is_ort_format(content):
        reason = "it is in ONNX Runtime's own format, which is run for who trusts its maker only"
        gate.refuse(reason)
    try:
        gate.check_model((0, len(content)))
    except Malformed as error:
        gate.refuse(str(error))


def is_ort_format(content: bytes) -> bool:
    """Return whether ONNX Runtime would read these bytes as its own file format (ORT format)."""
    return content[4:8] == b"ORTM"


class _Gate:
    """The check of one graph: its reader, its current subject, and the bodies left to check."""

    def __init__(self, stage: str, content: bytes) -> None:
        self._stage = stage
        self._content = content
        self._reader = Reader(content, max_fields=STAGE.fields)
        self._subject = "the graph"
        self._imported: frozenset[str] = frozenset()  # domains
        self._count = 0  # nodes and bodies so far
        self._given = 0  # names
        self._names: dict[bytes, str] = {}  # cache: most occur several times
        self._attributes: set[bytes] = set()  # likewise, those that passed the check
        self._types: set[bytes] = set()
        self._pending: list[tuple[Place, int]] = []  # bodies to be checked, and their depth

    def refuse(self, reason: str) -> NoReturn:
        raise ForbiddenGraph(self._stage, self._subject, reason)

    def check_model(self, place: Place) -> None:
        version = 0
        for name, start, stop in self._reader.read(place, schemas.MODEL):
            if name == "ir_version":
                version = start
            elif name == "graph":
                self._pending.append(((start, stop), 0))
            elif name == "opset":
                self._check_opset((start, stop))
            elif name != "version":
                self._check_other(name, (start, stop))
        if not 1 <= version <= operators.HIGHEST_IR_VERSION:
            self.refuse(f"its IR version {version} is none of 1 to {operators.HIGHEST_IR_VERSION}")
        if "" not in self._imported:
            self.refuse("it imports no opset of the standard operators")
        if not self._pending:
            self.refuse("it is empty")
        while self._pending:  # no recursion: deep nesting must not crash the process
            self._check_graph(*self._pending.pop())

    def _check_opset(self, place: Place) -> None:
        domain, version = "", 0
        for name, start, stop in self._reader.read(place, schemas.OPSET):
            if name == "version":
                version = start
            else:
                domain = self._read_name((start, stop))
        if domain not in operators.DOMAINS:
            self.refuse(f"it imports operators of the domain '{domain[:80]}'")
        own = domain == operators.TRAINING_DOMAIN
        highest = operators.HIGHEST_TRAINING_OPSET if own else operators.HIGHEST_OPSET
        if not 1 <= version <= highest:
            self.refuse(f"its opset {version} of '{domain}' is none of 1 to {highest}")
        self._imported |= {domain} if own else operators.STANDARD_DOMAINS

    def _check_graph(self, place: Place, depth: int) -> None:
        given: dict[str, set[str]] = {}  # kind of name -> those of this graph
        for name, start, stop in self._reader.read(place, schemas.GRAPH):
            self._subject = "the graph"
            if name == "node":
                self._check_node((start, stop), depth, given.setdefault("result", set()))
            elif name == "initializer":
                self._give(self._check_tensor((start, stop)), given.setdefault(name, set()))
            elif name in ("input", "output", "value"):
                self._give(self._check_value((start, stop)), given.setdefault(name, set()))
            else:
                self._check_other(name, (start, stop))

    def _give(self, name: str, given: set[str]) -> None:
        """Record a name, which must be new: duplicate outputs would crash ONNX Runtime."""
        if name in given:
            self.refuse(f"the name '{name[:200]}' is given twice")
        if name:  # an optional result that is left out has none
            given.add(name)
            self._given += 1
        if self._given > STAGE.names:
            self.refuse(f"the graph defines more than {STAGE.names} names")

    def _count_up(self) -> None:
        self._count += 1
        if self._count > STAGE.nodes:
            self.refuse(f"the graph has more than {STAGE.nodes} nodes")

    def _check_node(self, place: Place, depth: int, given: set[str]) -> None:
        self._count_up()
        self._subject = f"node number {self._count}"
        operator = domain = ""
        arguments = 0
        attributes: list[Place] = []
        for name, start, stop in self._reader.read(place, schemas.NODE):
            if name == "argument":
                self._read_name((start, stop))
                arguments += 1
            elif name == "result":
                self._give(self._read_name((start, stop)), given)
            elif name == "name":
                self._subject = f"node '{self._read_name((start, stop))[:200]}'"
            elif name == "operator":
                operator = self._read_name((start, stop))
            elif name == "domain":
                domain = self._read_name((start, stop))
            elif name == "attribute":
                attributes.append((start, stop))
                if len(attributes) > STAGE.attributes:
                    self.refuse(f"it has more than {STAGE.attributes} attributes")
            else:
                self._check_other(name, (start, stop))
        self._check_operator(operator, domain)
        for attribute in attributes:
            self._check_attribute(attribute, depth, einsum=operator == operators.EINSUM)
        if operator == operators.SCAN:
            self._check_scan(attributes, arguments)

    def _check_scan(self, attributes: list[Place], arguments: int) -> None:
        """Check the number of sequences: if there are fewer inputs, ONNX Runtime may crash."""
        for attribute in attributes:
            label = ""
            for name, start, stop in self._reader.read(attribute, schemas.ATTRIBUTE):
                if name == "name":
                    label = self._read_name((start, stop))
                elif name == "integers" and label == operators.SEQUENCES:
                    for count in map(to_signed, self._list_numbers((start, stop))):
                        if not 1 <= count <= arguments:
                            self.refuse(f"it reads {count} sequences, but has {arguments} inputs")

    def _check_operator(self, operator: str, domain: str) -> None:
        if domain not in self._imported:
            self.refuse(f"its domain '{domain[:80]}' is not imported")
        if not operators.is_known(operator, domain):
            self.refuse(
                f"'{operator[:80]}' of the domain '{domain}' is not an operator of a bundle"
            )

    def _check_attribute(self, place: Place, depth: int, *, einsum: bool) -> None:
        content = self._copy_short(place)
        if content in self._attributes and not einsum:
            return
        before = self._count
        self._read_attribute(place, depth, einsum=einsum)
        if self._count == before and not einsum:  # one with a body differs each time
            _keep(self._attributes, content)

    def _read_attribute(self, place: Place, depth: int, *, einsum: bool) -> None:
        label = None
        for name, start, stop in self._reader.read(place, schemas.ATTRIBUTE):
            here = (start, stop)
            if name == "name":
                label = self._read_name(here)
            elif label is None:  # serializers keep the order, and all that follows depends on it
                self.refuse("the name of an attribute does not come first")
            elif name == "integers":
                self._check_integers(label, here)
            elif name == "string":
                self._check_text(here)
                if einsum and not operators.EQUATION.fullmatch(self._content, *here):
                    self.refuse("it has no equation of letters")
            elif name == "tensor":
                self._check_tensor(here)
            elif name == "graph":
                self._count_up()
                if depth >= STAGE.depth:
                    self.refuse(f"bodies nest over {STAGE.depth} deep")
                self._pending.append((here, depth + 1))
            elif name == "type":
                self._check_type(here)
            elif name == "floats":
                self._count_fixed(here, 4)
            elif name != "kind":
                self._check_other(name, here)

    def _check_integers(self, label: str, place: Place) -> None:
        for number in self._list_numbers(place):
            value = to_signed(number)
            if label in operators.WINDOWS and value < 1:
                self.refuse(f"it has {label} below 1")
            if label in operators.AXES and abs(value) > STAGE.rank:
                self.refuse(f"its {label} names a dimension that no tensor has")
            if label in operators.KINDS and value and value not in schemas.DTYPES:
                self.refuse(f"its {label} names an unknown element type")
            if label == "batch_dims" and value < 0:
                self.refuse(f"it has {value} batch dimensions")

    def _check_tensor(self, place: Place) -> str:
        """Check a tensor and return its name."""
        label = ""
        dims: list[int] = []
        dtype, outside, raw = 0, False, None
        counts: Counter[str] = Counter()
        for name, start, stop in self._reader.read(place, schemas.TENSOR):
            here = (start, stop)
            if name == "dims":
                self._extend(dims, here)
            elif name == "dtype":
                dtype = start
            elif name == "raw_data":
                raw = stop - start
            elif name == "name":
                label = self._read_name(here)
                self._subject = f"tensor '{label[:200]}'"
            elif name == "location":
                outside = outside or start != 0
            elif name == "external_data":
                outside = True
            elif name in ("float_data", "double_data"):
                counts[name] += self._count_fixed(here, 4 if name == "float_data" else 8)
            elif name == "string_data":
                self._check_text(here)
                counts[name] += 1
            elif name.endswith("_data"):
                counts[name] += self._reader.count_numbers(here) if stop else 1
            else:
                self._check_other(name, here)
        if outside:
            self.refuse("its data are outside the graph")
        self._check_size(dims, dtype, raw, counts)
        return label

    def _extend(self, dims: list[int], place: Place) -> None:
        for number in self._list_numbers(place):
            dims.append(number)
            if len(dims) > STAGE.rank:
                self.refuse(f"it has more than {STAGE.rank} dimensions")

    def _check_size(
        self, dims: list[int], dtype: int, raw: int | None, counts: Counter[str]
    ) -> None:
        """Check that a tensor's declared size matches its bytes or its typed values."""
        self._check_dtype(dtype)
        if math.prod(max(dim, 1) for dim in dims) > STAGE.elements:
            self.refuse(f"its shape is {dims}")
        elements = math.prod(dims)
        bits, field = schemas.DTYPES[dtype]
        held = sum(counts.values())
        if raw is not None:
            size = -(-elements * bits // 8)
            if held or raw != size or dtype == schemas.STRINGS:
                self.refuse(f"it claims {size} bytes, but holds {raw}")
            return
        claimed = elements * 2 if dtype in schemas.COMPLEX else elements
        claimed = -(-elements // 2) if bits == 4 else claimed
        if counts[field] != claimed or held != claimed:
            self.refuse(f"it claims {claimed} values, but holds {held}")

    def _check_value(self, place: Place) -> str:
        """Check the declaration of a value, and return its name."""
        label = ""
        for name, start, stop in self._reader.read(place, schemas.VALUE):
            if name == "name":
                label = self._read_name((start, stop))
                self._subject = f"value '{label[:200]}'"
            elif name == "type":
                self._check_type((start, stop))
            else:
                self._check_other(name, (start, stop))
        return label

    def _check_type(self, place: Place) -> None:
        content = self._copy_short(place)
        if content not in self._types:
            self._read_type(place, 0)
            _keep(self._types, content)

    def _read_type(self, place: Place, depth: int) -> None:
        if depth > STAGE.type_depth:
            self.refuse(f"its type nests over {STAGE.type_depth} deep")
        for name, start, stop in self._reader.read(place, schemas.TYPE):
            if name == "tensor":
                self._check_tensor_type((start, stop))
            elif name == "nested":
                for _, *inner in self._reader.read((start, stop), schemas.NESTED_TYPE):
                    self._read_type((inner[0], inner[1]), depth + 1)
            else:
                self._check_other(name, (start, stop))

    def _check_tensor_type(self, place: Place) -> None:
        for name, start, stop in self._reader.read(place, schemas.TENSOR_TYPE):
            if name == "shape":
                self._check_shape((start, stop))
            else:
                self._check_dtype(start)

    def _check_dtype(self, dtype: int) -> None:
        if dtype not in schemas.DTYPES:
            self.refuse(f"its element type {dtype} is not known")

    def _check_shape(self, place: Place) -> None:
        dimensions = self._reader.read(place, schemas.SHAPE)
        for rank, (_, *dimension) in enumerate(dimensions, 1):
            if rank > STAGE.rank:
                self.refuse(f"it has more than {STAGE.rank} dimensions")
            here = (dimension[0], dimension[1])
            for name, start, stop in self._reader.read(here, schemas.DIMENSION):
                if name != "size":
                    self._read_name((start, stop))
                elif start > STAGE.elements:
                    self.refuse(f"it has a dimension of {to_signed(start)}")

    def _check_other(self, name: str, place: Place) -> None:
        """Check fields that do not affect the computation: comments, producers, pairs of texts."""
        if name == "text":
            self._check_text(place)
        elif name == "metadata":
            for _, start, stop in self._reader.read(place, schemas.PAIR):
                self._check_text((start, stop))
        elif place[1]:
            self._read_name(place)

    def _check_text(self, place: Place) -> None:
        if place[1] - place[0] > STAGE.text_bytes:
            self.refuse(f"it has a text of {place[1] - place[0]} bytes")

    def _read_name(self, place: Place) -> str:
        start, stop = place
        content = self._content[start : min(stop, start + STAGE.name_bytes)]
        name = self._names.get(content)
        if name is None:
            name = self._reader.read_text(place, STAGE.name_bytes)
            if len(content) <= _LONGEST_KEPT and len(self._names) < _MOST_KEPT:
                self._names[content] = name
        return name

    def _copy_short(self, place: Place) -> bytes:
        """Return the bytes as a cache key, or ``b""`` if they are too long to be cached."""
        start, stop = place
        return self._content[start:stop] if stop - start <= _LONGEST_KEPT else b""

    def _list_numbers(self, place: Place) -> Iterator[int]:
        """Return an iterator over a single number, or over the numbers of a packed list."""
        return self._reader.read_numbers(place) if place[1] else iter(place[:1])

    def _count_fixed(self, place: Place, width: int) -> int:
        size = place[1] - place[0]
        if size % width:
            raise Malformed("a list of numbers is cut short")
        return size // width


def _keep(passed: set[bytes], content: bytes) -> None:
    if content and len(passed) < _MOST_KEPT:
        passed.add(content)
