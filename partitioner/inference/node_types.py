"""Infer the element types of a joint graph's values with ONNX Runtime.

onnx's own inference stops at training-only operators, which it does not know.  An ONNX Runtime
session for the complete graph yields all types, but takes time quadratic in the number of nodes.  A
large graph is therefore reduced to one node of each *kind*.  Nodes are of the same kind if they
have the same operator and attributes, and if their inputs and outputs have the same declared types
and shapes.  Then all their inferred types are the same too, and ONNX Runtime has a kernel either
for all of them or for none.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from splitonnx.errors import NativeCrash
from splitonnx.partitioner.graphs.transcripts import write_model, write_node
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.native import natives
from splitonnx.partitioner.native.workers import Refused, call

FEW_NODES = 2000
"""Limit of nodes up to which the complete graph is passed to ONNX Runtime."""

_SUBJECT = "the joint graph"
_Type = tuple[int, tuple[int | str | None, ...] | None]
"""A tensor's element type, and its dimensions or ``None`` if their number is not known."""
_BODIES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


def list_types(model: ir.Model) -> Mapping[str, str]:
    """Return the types of values by name, in ONNX Runtime's notation.

    The result contains at least all values whose type is not declared.

    Raises:
        Refused: ONNX Runtime rejects the graph, for example because it has no kernel for a node.
    """
    if len(model.graph) > FEW_NODES:
        try:
            return _ask_kinds(model)
        except (_WithoutKind, Refused, NativeCrash):
            pass  # some kernels fail or crash without the complete graph
    return _ask_graph(model)


def _ask_graph(model: ir.Model) -> Mapping[str, str]:
    proto = write_model(model)
    known = {value.name for value in proto.graph.output}
    names = (name for name in map_values(model.graph) if name not in known)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return call(natives.list_types, _SUBJECT, proto.SerializeToString())


class _WithoutKind(Exception):
    """Raised if a node has a body or reads something other than tensors of known type."""


@dataclass(frozen=True, kw_only=True)
class _Kinds:
    """A graph with one node of each kind, and one input for each type."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    outputs: dict[Hashable, list[str]] = field(default_factory=dict)
    inputs: dict[_Type, str] = field(default_factory=dict)
    made: list[onnx.ValueInfoProto] = field(default_factory=list)

    def declare(self, declared: _Type) -> str:
        return self.inputs.setdefault(declared, f"i{len(self.inputs)}")

    def add(self, node: ir.Node, inputs: list[str]) -> list[str]:
        """Return the names of a node's outputs in this graph.

        If there is no node of the same kind yet, the node is added first.
        """
        attributes = [(a.name, a.type, _freeze(a)) for a in node.attributes.values()]
        types = tuple(_read_type(value) for value in node.outputs)
        named = tuple(bool(value.name) for value in node.outputs)
        key = (node.domain, node.op_type, *inputs, types, named, *sorted(attributes))
        if key not in self.outputs:
            names = [f"o{len(self.nodes)}.{i}" if n else "" for i, n in enumerate(named)]
            self.nodes.append(write_node(node, inputs, names))
            self.made.extend(_declare(n, t) for n, t in zip(names, types, strict=True) if n)
            self.outputs[key] = names
        return self.outputs[key]


def _read_type(value: ir.Value) -> _Type | None:
    if value.type is None:
        return None
    if not isinstance(value.type, ir.TensorType):
        raise _WithoutKind
    shape = value.shape
    dims = None if shape is None else tuple(d if isinstance(d, int) else d.value for d in shape)
    return value.type.dtype.value, dims


def _declare(name: str, declared: _Type | None) -> onnx.ValueInfoProto:
    if declared is None:
        return onnx.ValueInfoProto(name=name)
    return onnx.helper.make_tensor_value_info(name, *declared)


def _freeze(attribute: ir.Attr) -> Hashable:
    if attribute.type in _BODIES or attribute.is_ref():
        raise _WithoutKind
    if isinstance(value := attribute.value, int | float | str | bytes):
        return value
    content: bytes = ir.serde.serialize_attribute(attribute).SerializeToString()
    return content


def _ask_kinds(model: ir.Model) -> Mapping[str, str]:
    """Infer types by asking ONNX Runtime for a graph with one node of each kind.

    If the type of a node's input is not declared, the input is connected to the node in this graph
    that computes it.
    """
    kinds = _Kinds()
    stand_ins: dict[ir.Value, str] = {}

    def find(value: ir.Value | None) -> str:
        if value is None:
            return ""
        if value in stand_ins:
            return stand_ins[value]
        declared = _read_type(value)
        if declared is None:
            raise _WithoutKind
        return kinds.declare(declared)

    for node in model.graph:
        if node.op_type == "Constant" and all(value.type is not None for value in node.outputs):
            continue
        names = kinds.add(node, [find(value) for value in node.inputs])
        stand_ins.update(
            (value, name) for value, name in zip(node.outputs, names, strict=True)
            if value.type is None
        )  # fmt: skip
    types = call(natives.list_types, _SUBJECT, _write(model, kinds))
    return {value.name or "": types[name] for value, name in stand_ins.items() if value.name}


def _write(model: ir.Model, kinds: _Kinds) -> bytes:
    graph = onnx.helper.make_graph(
        kinds.nodes,
        "kinds",
        [_declare(name, declared) for declared, name in kinds.inputs.items()],
        kinds.made,
    )
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    content: bytes = made.SerializeToString()
    return content
