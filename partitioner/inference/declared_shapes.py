"""Replace the shapes that a model's file declares with shapes inferred from the model's inputs.

Declared shapes may be wrong: some exporters declare shapes in another layout, and tools that change
the batch size of an input do not change the shapes of later values.  onnx's inference trusts these
shapes, and ONNX Runtime stops at a value of another shape.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from splitonnx.partitioner.graphs.faults import (
    attribute_errors_to_bytes,
    attribute_errors_to_pass,
)
from splitonnx.partitioner.graphs.transcripts import write_model
from splitonnx.partitioner.graphs.traversals import list_bodies
from splitonnx.partitioner.inference.inferences import Inference
from splitonnx.partitioner.inference.shapes import infer_message, lighten, refuse_types
from splitonnx.partitioner.native.workers import Refused

_MOST_ROUNDS = 16
"""The limit on how often shapes are inferred until those of all loops agree with their bodies."""
_CARRIED = 2
"""The number of inputs of a Loop, and of its body, before the values that it carries."""
_LOOPS = ("Loop", "Scan")
_ELEMENTWISE = frozenset(
    ["Abs", "Add", "Cast", "Clip", "Div", "Elu", "Exp", "Identity", "LeakyRelu", "Log",
     "LogSoftmax", "Mul", "Neg", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt", "Sub", "Tanh"]
)  # fmt: skip
"""Operators whose result has the largest of their inputs' ranks."""

Dims = Sequence[int | str | None]


def drop_declared_shapes(model: ir.Model) -> None:
    """Replace the declared shapes of values with shapes inferred from the model's inputs, in place.

    This includes the values in the bodies of If, Loop and Scan.  A declared shape is kept if
    nothing is inferred for the value, not even its number of dimensions; but it is dropped behind
    a Squeeze that would have this rank for a batch of 1 only.  What onnx does not infer in a body,
    such as the result of an Expand to a computed shape, is left to :class:`Inference`; in the
    outermost graph, folding does so later.  In the shapes of the model's outputs, declared sizes
    after the first axis replace sizes that onnx cannot infer, because a loss needs the number of
    classes.
    """
    bodies = list(model.graphs())[1:]
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    values += [value for body in bodies for value in body.inputs]
    if all(value.shape is None for value in values):
        return
    with attribute_errors_to_pass("written down"), lighten(model.graph):
        proto = write_model(model)
    symbols = {str(dim) for value in model.graph.inputs for dim in _list_dims(value.shape)}
    loops = _Loops(symbols=symbols)
    _clear_shapes(proto.graph, loops)
    with attribute_errors_to_bytes(refuse_types):
        typed = _infer(proto, loops)
        if typed is None:
            return
        unsure: dict[ir.Value, ir.Shape] = {}
        _note_shapes(model.graph, typed, symbols, unsure, is_body=False)
    if unsure:
        _infer_bodies(model.graph, Inference(model.graph.opset_imports[""]), unsure)


def _list_dims(shape: ir.Shape | None) -> Dims:
    return [dim if isinstance(dim, int) else dim.value for dim in shape or ()]


def _clear_shapes(graph: onnx.GraphProto, loops: _Loops, place: tuple[int, ...] = ()) -> None:
    """Remove all declared shapes but those of the inputs of the outermost graph.

    ``loops`` keeps what is declared for the values that loops carry.
    """
    del graph.value_info[:]
    for value in graph.output:
        _write_dims(value.type, None)
    for index, node in enumerate(graph.node):
        for number, body in enumerate(_list_bodies(node)):
            _clear_shapes(body, loops, (*place, index, number))
            for position, value in enumerate(
                body.input[_CARRIED if node.op_type == "Loop" else 0 :]
            ):
                loops.declared[*place, index, position] = _read_dims(value.type, loops.symbols)
                _write_dims(value.type, None)


def _list_bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    bodies: list[onnx.GraphProto] = []
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            bodies.append(attribute.g)
        bodies.extend(attribute.graphs)
    return bodies


def _infer(proto: onnx.ModelProto, loops: _Loops) -> onnx.GraphProto | None:
    """Infer the shapes of a model, also of what its loops carry, or return None if onnx cannot."""
    for _ in range(_MOST_ROUNDS):
        try:
            content = infer_message(proto.SerializeToString(), check_type=False)
        except Refused:
            return None
        typed: onnx.GraphProto = onnx.ModelProto.FromString(content).graph
        if not loops.correct(proto.graph, typed, {}, ()):
            return typed
    return None


def _infer_bodies(
    graph: ir.Graph, known: Inference, unsure: MutableMapping[ir.Value, ir.Shape]
) -> None:
    """Infer the shapes in ``unsure`` once more, of values in bodies, and keep those not found."""
    for node in graph:
        for body in list_bodies(node):
            _infer_bodies(body, known, unsure)
        for value in unsure.keys() & set(node.outputs):
            value.shape = None
        known.visit(node)
        for value in unsure.keys() & set(node.outputs):
            known.note(value)
            if value.shape is None:
                value.shape = unsure[value]


def _note_shapes(
    graph: ir.Graph,
    typed: onnx.GraphProto,
    symbols: Collection[str],
    unsure: MutableMapping[ir.Value, ir.Shape],
    *,
    is_body: bool,
) -> None:
    """Replace the shapes of a graph's values, and of those in its bodies, by those in ``typed``.

    Add to ``unsure`` the values of bodies whose declared shape is left.
    """
    found, outputs = _list_types(typed), () if is_body else set(graph.outputs)
    inputs = list(graph.inputs) if is_body else []
    ranks: dict[ir.Value, int] = {}
    sizes = {name: _read_dims(kind, symbols) for name, kind in found.items()}
    for value in (*inputs, *(value for node in graph for value in node.outputs)):
        declared, dims = _list_dims(value.shape), sizes.get(value.name or "")
        if not dims and (rank := _find_rank(value, ranks, sizes)) is not None:
            ranks[value] = rank
            if len(declared) != rank:
                value.shape = None
        if value.shape is None or dims is None:
            if is_body and value.shape is not None and value.producer() is not None:
                unsure[value] = value.shape
            continue
        if value in outputs and dims and len(declared) == len(dims):
            rest = zip(dims[1:], declared[1:], strict=True)
            dims = [dims[0], *(old if new is None else new for new, old in rest)]
        value.shape = ir.Shape(dims)
    for node, made in zip(graph, typed.node, strict=True):
        for body, typed_body in zip(list_bodies(node), _list_bodies(made), strict=True):
            _note_shapes(body, typed_body, symbols, unsure, is_body=True)


def _find_rank(
    value: ir.Value, ranks: Mapping[ir.Value, int], sizes: Mapping[str, Dims | None]
) -> int | None:
    """Return the rank of a value behind a Squeeze without axes, for a batch of several samples.

    For a batch of 1, the Squeeze drops the batch, too, and an export with one sample declares that.
    ``ranks`` holds the ranks of earlier such values, and ``sizes`` the inferred shapes of others.
    Return ``None`` for all other values.
    """
    node = value.producer()
    if node is None or node.domain:
        return None
    read = [each for each in node.inputs if each is not None]
    given = {each: sizes.get(each.name or "") or _list_dims(each.shape) for each in read}
    if node.op_type == "Squeeze" and len(read) == 1 and given[read[0]]:
        return len([dim for dim in given[read[0]] if dim != 1])
    if node.op_type not in _ELEMENTWISE or ranks.keys().isdisjoint(read):
        return None
    return max(ranks.get(each, len(given[each])) for each in read)


def _list_types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    return {info.name: info.type for info in (*graph.input, *graph.value_info, *graph.output)}


def _read_dims(kind: onnx.TypeProto | None, symbols: Collection[str]) -> Dims | None:
    """Read the shape of a type, without the symbols that onnx invents for unknown sizes."""
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    return [
        dim.dim_value
        if dim.HasField("dim_value")
        else (dim.dim_param if dim.dim_param in symbols else None)
        for dim in kind.tensor_type.shape.dim
    ]


@dataclass(frozen=True, kw_only=True)
class _Loops:
    """The assumed shapes of the values that loops carry, by the place of the value in the model.

    onnx infers no shape for a value that a Loop carries, since it may change from one iteration to
    the next.  The value is assumed to have its initial shape.  Where the body returns another size,
    the size is not known, and the shapes are inferred again.  The assumptions that remain are true:
    they hold at first, and the body preserves them.  If nothing is inferred for what the body
    returns, it is assumed to have the declared shape as far as the initial value has it.
    """

    symbols: Collection[str]
    assumed: dict[tuple[int, ...], Dims | None] = field(default_factory=dict)
    declared: dict[tuple[int, ...], Dims | None] = field(default_factory=dict)

    def correct(
        self,
        graph: onnx.GraphProto,
        typed: onnx.GraphProto,
        around: Mapping[str, onnx.TypeProto],
        place: tuple[int, ...],
    ) -> bool:
        """Write better assumptions into ``graph``, and return whether there are any.

        ``typed`` is the graph with the shapes that were inferred from the previous assumptions, and
        ``around`` has the types of the values in the surrounding graphs.
        """
        scope, changed = {**around, **_list_types(typed)}, False
        for index, (node, made) in enumerate(zip(graph.node, typed.node, strict=True)):
            bodies = list(zip(_list_bodies(node), _list_bodies(made), strict=True))
            inside = [
                self.correct(body, typed_body, scope, (*place, index, number))
                for number, (body, typed_body) in enumerate(bodies)
            ]
            changed = changed or any(inside)
            if node.op_type == "Loop" and not any(inside):
                changed = self._correct_loop(graph, node, made, scope, (*place, index)) or changed
        return changed

    def _correct_loop(
        self,
        graph: onnx.GraphProto,
        node: onnx.NodeProto,
        made: onnx.NodeProto,
        scope: Mapping[str, onnx.TypeProto],
        place: tuple[int, ...],
    ) -> bool:
        body, found = _list_bodies(node)[0], {**scope, **_list_types(_list_bodies(made)[0])}
        changed = False
        for index, initial in enumerate(node.input[_CARRIED:]):
            before, after = body.input[index + _CARRIED], body.output[index + 1]
            key, dims = (*place, index), _read_dims(scope.get(initial), self.symbols)
            returned = _read_dims(found.get(after.name), self.symbols)
            if key in self.assumed:
                kept = self.declared[key] if returned is None else returned
                dims = _join(self.assumed[key], _join(dims, kept))
                if dims == self.assumed[key]:
                    continue
                if returned is None:
                    _declare(after, found.get(after.name), dims)
            elif dims is None:
                continue
            self.assumed[key], changed = dims, True
            name = node.output[index] if index < len(node.output) else ""
            _declare(before, found.get(before.name), dims)
            if name in scope:
                _declare(_find_info(graph, name), scope[name], dims)
        return changed


def _join(left: Dims | None, right: Dims | None) -> Dims | None:
    """Return what is true of both shapes; None if their numbers of dimensions differ."""
    if left is None or right is None or len(left) != len(right):
        return None
    return [a if a == b else None for a, b in zip(left, right, strict=True)]


def _find_info(graph: onnx.GraphProto, name: str) -> onnx.ValueInfoProto:
    """Return the declaration of a value, after adding an empty one if there is none."""
    infos = [info for info in (*graph.output, *graph.value_info) if info.name == name]
    info: onnx.ValueInfoProto = infos[0] if infos else graph.value_info.add(name=name)
    return info


def _declare(info: onnx.ValueInfoProto, kind: onnx.TypeProto | None, dims: Dims | None) -> None:
    """Declare a value with a shape, and as of type ``kind`` if it has no type yet."""
    if kind is not None and info.type.WhichOneof("value") is None:
        info.type.CopyFrom(kind)
    _write_dims(info.type, dims)


def _write_dims(kind: onnx.TypeProto, dims: Dims | None) -> None:
    if not kind.HasField("tensor_type"):
        return
    kind.tensor_type.ClearField("shape")
    if dims is None:
        return
    kind.tensor_type.shape.SetInParent()
    for dim in dims:
        if isinstance(dim, int):
            kind.tensor_type.shape.dim.add(dim_value=dim)
        else:
            kind.tensor_type.shape.dim.add(dim_param=dim)
