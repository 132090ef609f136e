"""Replace sequences and optionals with the tensors in them.

No gradient can pass through a sequence.  However, the sequences that exporters write, such as the
outputs of a loop or of a SplitToSequence, usually have a fixed length and are read at fixed
positions.  Every tensor that is read from such a sequence can be replaced by the tensor that was
inserted there.  Other sequences stay unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.bodies import copy_body
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims
from splitonnx.partitioner.graphs.traversals import list_bodies, list_nodes
from splitonnx.partitioner.inference.control_flows import KEPT, MOST_NODES
from splitonnx.partitioner.inference.node_faults import attribute_errors_to

MOST_PIECES = 1 << 12
"""Limit of tensors into which one SplitToSequence is split."""
MOST_HELD = 1 << 20
"""Limit of tensors in all sequences of a model together.

Each operator that returns a sequence adds the length of this sequence to the count.
"""

Row = Sequence[ir.Value]
"""The tensors in a sequence or an optional; an optional has at most one tensor."""


class _Unknown(Exception):
    """Raised if a sequence's length or a position in it is not known, or a limit is exceeded."""


def flatten_sequences(graph: ir.Graph) -> bool:
    """Make nodes read tensors directly instead of through sequences, in place, also in bodies.

    Outputs keep their names.  Return ``True`` if any node was replaced.
    """
    replaced = _flatten(graph, _Rows())
    for node in reversed(replaced):
        unused = not any(value.uses() or value.is_graph_output() for value in node.outputs)
        if node.graph is not None and unused:
            node.graph.remove(node, safe=True)
    return bool(replaced)


def _flatten(graph: ir.Graph, rows: _Rows) -> list[ir.Node]:
    replaced = []
    for node in list(graph):
        if node.op_type in ("If", "Loop", "Scan") and not node.domain:
            for body in list_bodies(node):
                replaced += _flatten(body, rows)
        rule = _RULES.get(node.op_type)
        if rule is None or node.domain:
            continue
        with attribute_errors_to(node, "replaced by its tensors"):
            try:
                rule(rows, node)
            except _Unknown:
                continue
        replaced.append(node)
    return replaced


class _Rows:
    """The tensors in each known sequence and optional."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, Row] = {}
        self._held = 0
        self.written = 0
        """The number of nodes created so far by copying bodies."""

    def __contains__(self, value: ir.Value | None) -> bool:
        return value in self._known

    def read(self, value: ir.Value | None) -> list[ir.Value]:
        """Return the tensors in a sequence.

        Raises:
            _Unknown: they are not known.
        """
        if value is None or value not in self._known:
            raise _Unknown
        return list(self._known[value])

    def note(self, value: ir.Value, row: Row) -> None:
        """Store which tensors are in a sequence.

        Raises:
            _Unknown: there are more than :data:`MOST_HELD` tensors in all sequences.
        """
        self._held += len(row)
        if self._held > MOST_HELD:
            raise _Unknown
        self._known[value] = row


def _list_inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _read_position(node: ir.Node, index: int, length: int) -> int:
    """Return a position in a sequence that a node reads as a constant input.

    A negative position counts from the end and is converted.

    Raises:
        _Unknown: the position is not a constant, or is out of range.
    """
    value = node.inputs[index]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise _Unknown
    place = int(tensor.numpy().reshape(-1)[0])
    if not -length <= place <= length:
        raise _Unknown
    return place + length if place < 0 else place


def _replace(node: ir.Node, write: Callable[[NodeBuilder], ir.Value]) -> None:
    builder = NodeBuilder(f"{node.outputs[0].name or node.name}/flat")
    builder.replace(node, [write(builder)])


def _construct(rows: _Rows, node: ir.Node) -> None:
    rows.note(node.outputs[0], _list_inputs(node))


def _insert(rows: _Rows, node: ir.Node) -> None:
    row, value = rows.read(node.inputs[0]), node.inputs[1]
    assert value is not None
    last = len(node.inputs) < 3 or node.inputs[2] is None
    row.insert(len(row) if last else _read_position(node, 2, len(row)), value)
    rows.note(node.outputs[0], row)


def _erase(rows: _Rows, node: ir.Node) -> None:
    row = rows.read(node.inputs[0])
    last = len(node.inputs) < 2 or node.inputs[1] is None
    place = len(row) - 1 if last else _read_position(node, 1, len(row))
    if place >= len(row):
        raise _Unknown
    rows.note(node.outputs[0], [*row[:place], *row[place + 1 :]])


def _take(rows: _Rows, node: ir.Node) -> None:
    row = rows.read(node.inputs[0])
    place = _read_position(node, 1, len(row))
    if place >= len(row):
        raise _Unknown
    _replace(node, lambda builder: row[place])


def _measure(rows: _Rows, node: ir.Node) -> None:
    row = rows.read(node.inputs[0])
    _replace(node, lambda builder: builder.integer(len(row)))


def _copy(rows: _Rows, node: ir.Node) -> None:
    rows.note(node.outputs[0], rows.read(node.inputs[0]))


def _split(rows: _Rows, node: ir.Node) -> None:
    """Replace SplitToSequence by Split.

    If ``keepdims`` is 0 and no lengths are given, the axis is removed from the pieces.
    """
    x, axis = node.inputs[0], node.attributes.get_int("axis", 0)
    assert x is not None
    given = node.inputs[1] if len(node.inputs) > 1 else None
    extents, one_each = _measure_pieces(x, axis, given)
    builder = NodeBuilder(f"{node.outputs[0].name or node.name}/flat")
    if len(extents) == 1:
        pieces: Row = [builder.op("Identity", x)]
    else:
        settings = [x, builder.integers(extents)]
        pieces = builder.ops("Split", settings, len(extents), {"axis": axis})
    if one_each and not node.attributes.get_int("keepdims", 1):
        pieces = [builder.op("Squeeze", piece, builder.integers([axis])) for piece in pieces]
    graph = node.graph
    assert graph is not None
    for piece in pieces:
        piece.type = ir.TensorType(x.dtype) if x.dtype is not None else None
    graph.insert_before(node, builder.nodes)
    rows.note(node.outputs[0], pieces)


def _measure_pieces(x: ir.Value, axis: int, given: ir.Value | None) -> tuple[list[int], bool]:
    """Return the length of each piece, and whether all are 1 because no lengths were given."""
    tensor = None if given is None else ir.convenience.get_const_tensor(given)
    if given is not None and tensor is None:
        raise _Unknown
    if tensor is not None and tensor.size > MOST_PIECES:
        raise _Unknown
    if tensor is not None and len(tensor.shape):
        return [int(extent) for extent in tensor.numpy()], False
    dims = known_dims(x)
    total = None if dims is None else dims[axis]
    if not total:
        raise _Unknown
    size = 1 if tensor is None else int(tensor.numpy().item())
    if size < 1 or total > size * MOST_PIECES:
        raise _Unknown
    pieces = [min(size, total - start) for start in range(0, total, size)]
    return pieces, tensor is None


def _concat(rows: _Rows, node: ir.Node) -> None:
    row, axis = rows.read(node.inputs[0]), node.attributes.get_int("axis")
    if not row:
        raise _Unknown

    def write(builder: NodeBuilder) -> ir.Value:
        parts = row
        if node.attributes.get_int("new_axis", 0):
            parts = [builder.op("Unsqueeze", value, builder.integers([axis])) for value in row]
        return builder.op("Concat", *parts, axis=axis)

    _replace(node, write)


def _map(rows: _Rows, node: ir.Node) -> None:
    """Replace SequenceMap by one copy of its body per element of the sequence.

    All copies read the same tensors for inputs that are not sequences.
    """
    body = node.attributes["body"].as_graph()
    first, *others = node.inputs
    length = len(rows.read(first))
    columns = [rows.read(first)]
    for value in others:
        assert value is not None
        columns.append(rows.read(value) if value in rows else [value] * length)
    if any(len(column) != length for column in columns):
        raise _Unknown
    rows.written += length * max(len(list_nodes(body)), 1)
    if rows.written > MOST_NODES:
        node.metadata_props[KEPT] = (
            f"{length} runs of it would be more than {MOST_NODES} nodes in place of bodies"
        )
        raise _Unknown
    graph = node.graph
    assert graph is not None
    made: list[list[ir.Value]] = [[] for _ in node.outputs]
    for index in range(length):
        bound = [column[index] for column in columns]
        nodes, results = copy_body(body, f"{node.name}/{index}", bound)
        graph.insert_before(node, nodes)
        for row, value in zip(made, results, strict=True):
            row.append(value)
    for output, row in zip(node.outputs, made, strict=True):
        rows.note(output, row)


def _wrap(rows: _Rows, node: ir.Node) -> None:
    """Record which tensor, if any, an Optional contains; Optionals of sequences are skipped."""
    inputs = _list_inputs(node)
    if inputs and inputs[0] in rows:
        raise _Unknown
    rows.note(node.outputs[0], inputs)


def _unwrap(rows: _Rows, node: ir.Node) -> None:
    (value,) = _list_inputs(node)
    if value in rows:
        row = rows.read(value)
        if len(row) != 1 or _makes_sequence(value):
            raise _Unknown
        _replace(node, lambda builder: row[0])
    elif isinstance(value.type, ir.TensorType):
        _replace(node, lambda builder: value)
    else:
        raise _Unknown


def _makes_sequence(value: ir.Value) -> bool:
    maker = value.producer()
    return maker is not None and maker.op_type.startswith(("Sequence", "Split"))


def _ask(rows: _Rows, node: ir.Node) -> None:
    """Replace OptionalHasElement by a constant, which is always true for a tensor."""
    inputs = _list_inputs(node)
    if inputs and inputs[0] not in rows and not isinstance(inputs[0].type, ir.TensorType):
        raise _Unknown
    full = bool(inputs) and (inputs[0] not in rows or bool(rows.read(inputs[0])))
    _replace(node, lambda builder: builder.number(full, ir.DataType.BOOL))


_RULES: Mapping[str, Callable[[_Rows, ir.Node], None]] = {
    "ConcatFromSequence": _concat,
    "Identity": _copy,
    "Optional": _wrap,
    "OptionalGetElement": _unwrap,
    "OptionalHasElement": _ask,
    "SequenceAt": _take,
    "SequenceConstruct": _construct,
    "SequenceEmpty": _construct,
    "SequenceErase": _erase,
    "SequenceInsert": _insert,
    "SequenceLength": _measure,
    "SequenceMap": _map,
    "SplitToSequence": _split,
}
"""Map each operator on sequences or optionals to the function that handles it."""
