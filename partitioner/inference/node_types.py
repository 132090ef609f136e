"""Infer the element types of a joint graph's values like ONNX Runtime.

onnx's own inference stops at the training-only operators, which it does not know.  An ONNX Runtime
session of the whole graph yields all types, but takes time quadratic in the number of nodes.  A
large graph is therefore reduced to one node of each *kind*.  Nodes with the same operator,
attributes, types and declared shapes have outputs of the same types, and use the same kernel or
have none.
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
"""Graphs of up to this many nodes are passed to ONNX Runtime as a whole."""

_SUBJECT = "the joint graph"
_Type = tuple[int, tuple[int | str | None, ...] | None]
"""An element type, and the dimensions if their number is known."""
_BODIES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


def list_types(model: ir.Model) -> Mapping[str, str]:
    """Map the names of values to their types, in ONNX Runtime's notation.

    The result has at least the values whose type is not declared.

    Raises:
        Refused: ONNX Runtime rejects the graph, for example because a node has no kernel.
    """
    if len(model.graph) > FEW_NODES:
        try:
            return _ask_kinds(model)
        except (_WithoutKind, Refused, NativeCrash):
            pass  # a kernel may need the whole graph, and be refused or crash without it
    return _ask_graph(model)


def _ask_graph(model: ir.Model) -> Mapping[str, str]:
    proto = write_model(model)
    known = {value.name for value in proto.graph.output}
    names = (name for name in map_values(model.graph) if name not in known)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return call(natives.list_types, _SUBJECT, proto.SerializeToString())


class _WithoutKind(Exception):
    """Raised if a node has no kind: it holds a graph, or reads something other than a tensor."""


@dataclass(frozen=True, kw_only=True)
class _Kinds:
    """A graph with one node of each kind, whose inputs are shared by type."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    outputs: dict[Hashable, list[str]] = field(default_factory=dict)
    inputs: dict[_Type, str] = field(default_factory=dict)
    made: list[onnx.ValueInfoProto] = field(default_factory=list)

    def declare(self, declared: _Type) -> str:
        return self.inputs.setdefault(declared, f"i{len(self.inputs)}")

    def add(self, node: ir.Node, inputs: list[str]) -> list[str]:
        """Add a node, unless its kind is present; return the names of its outputs in this graph."""
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
    """Infer types with a graph that has one node of each kind.

    An input without a declared type is connected to the node of this graph that computes it.
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
