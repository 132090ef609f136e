"""Read and copy graphs in half the time that onnx-ir takes, with the same results.

Models with less common content (subgraph bodies, functions, quantization, metadata on values) are
read by onnx-ir itself.  Values with the same shape share one shape object, so shapes must not be
changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir

from splitonnx.partitioner.graphs.transcripts import has_metadata, replace_graph

_BODIES = frozenset([ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS])
_BODY_KINDS = frozenset([onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS])


class _Rare(Exception):
    """Raised if a graph has content that only onnx-ir can read."""


def read_model(proto: onnx.ModelProto) -> ir.Model:
    """Convert a protobuf message to a model, like ``ir.from_proto``."""
    try:
        if proto.functions or proto.configuration:
            raise _Rare
        graph = _GraphReader(proto.graph).read()
    except _Rare:
        return ir.from_proto(proto)
    graph.opset_imports.update(ir.serde.deserialize_opset_import(proto.opset_import))
    return ir.Model(
        graph,
        ir_version=proto.ir_version,
        producer_name=_get(proto, "producer_name"),
        producer_version=_get(proto, "producer_version"),
        domain=_get(proto, "domain"),
        model_version=_get(proto, "model_version"),
        doc_string=_get(proto, "doc_string"),
        metadata_props=ir.serde.deserialize_metadata_props(proto.metadata_props),
    )


def copy_model(model: ir.Model) -> ir.Model:
    """Return a copy of a model, like its ``clone`` method."""
    try:
        if model.functions:
            raise _Rare
        return replace_graph(model, _GraphCopier().copy(model.graph))
    except _Rare:
        return model.clone()


def _get(proto: Any, field: str) -> Any:
    return getattr(proto, field) if proto.HasField(field) else None


class _GraphReader:
    """Converts one graph from its protobuf message; equal types are converted only once."""

    def __init__(self, proto: onnx.GraphProto) -> None:
        if proto.quantization_annotation:
            raise _Rare
        self._proto = proto
        self._infos: Mapping[str, onnx.ValueInfoProto] = {v.name: v for v in proto.value_info}
        self._values: dict[str, ir.Value] = {}
        self._types: dict[bytes, tuple[ir.Shape | None, ir.TypeProtocol | None]] = {}

    def read(self) -> ir.Graph:
        proto = self._proto
        inputs = [self._note(self._make(info.name), info) for info in proto.input]
        stored = [self._store(tensor) for tensor in proto.initializer]
        nodes = [self._read_node(node) for node in proto.node]
        for info in proto.output:
            self._note(self._find(info.name), info)
        return ir.Graph(
            inputs,
            [self._find(info.name) for info in proto.output],
            nodes=nodes,
            initializers=stored,
            doc_string=_get(proto, "doc_string"),
            name=_get(proto, "name"),
            metadata_props=ir.serde.deserialize_metadata_props(proto.metadata_props),
        )

    def _find(self, name: str) -> ir.Value:
        if name not in self._values:
            raise _Rare
        return self._values[name]

    def _make(self, name: str) -> ir.Value:
        if name in self._values:
            raise _Rare
        value = self._values[name] = ir.Value(name=name)
        return value

    def _note(self, value: ir.Value, info: onnx.ValueInfoProto) -> ir.Value:
        """Set a value's type and shape as declared in ``info``, and return the value."""
        if info.metadata_props:
            raise _Rare
        key = info.type.SerializeToString()
        if key not in self._types:
            self._types[key] = (
                ir.serde.deserialize_type_proto_for_shape(info.type),
                ir.serde.deserialize_type_proto_for_type(info.type),
            )
        shape, kind = self._types[key]
        if type(kind) is ir.TensorType:  # types may be changed, so each value gets its own
            kind = ir.TensorType(kind.dtype, denotation=kind.denotation)
        elif kind is not None:
            kind = ir.serde.deserialize_type_proto_for_type(info.type)
        value.shape, value.type, value.doc_string = shape, kind, _get(info, "doc_string")
        return value

    def _store(self, proto: onnx.TensorProto) -> ir.Value:
        tensor = ir.serde.deserialize_tensor(proto)
        if not tensor.name:
            raise _Rare
        value = self._values.get(tensor.name)
        if value is None:
            value = self._make(tensor.name)
            value.type = ir.TensorType(tensor.dtype)
            value.shape = tensor.shape  # type: ignore[assignment]  # which is one, in onnx-ir
            if tensor.name in self._infos:
                self._note(value, self._infos[tensor.name])
        value.const_value = tensor
        return value

    def _read_node(self, proto: onnx.NodeProto) -> ir.Node:
        attributes = proto.attribute
        if any(each.type in _BODY_KINDS for each in attributes) or proto.device_configurations:
            raise _Rare
        outputs = []
        inputs = [self._find(name) if name else None for name in proto.input]
        for name in proto.output:
            if name:
                value = self._make(name)
                if name in self._infos:
                    self._note(value, self._infos[name])
            else:
                value = ir.Value(name="")
            outputs.append(value)
        return ir.Node(
            proto.domain,
            proto.op_type,
            inputs,
            [ir.serde.deserialize_attribute(each) for each in attributes],
            overload=proto.overload,
            outputs=outputs,
            name=proto.name,
            doc_string=_get(proto, "doc_string"),
            metadata_props=ir.serde.deserialize_metadata_props(proto.metadata_props),
        )


class _GraphCopier:
    """Copies one graph; the copy shares tensors and shapes with the original."""

    def __init__(self) -> None:
        self._values: dict[ir.Value, ir.Value] = {}

    def copy(self, graph: ir.Graph) -> ir.Graph:
        if has_metadata(graph):
            raise _Rare
        inputs = [self._find_source(value) for value in graph.inputs]
        stored = [self._find_source(value) for value in graph.initializers.values()]
        nodes = [self._copy_node(node) for node in graph]
        return ir.Graph(
            inputs,
            [self._find(value) for value in graph.outputs],
            nodes=nodes,
            initializers=stored,
            doc_string=graph.doc_string,
            opset_imports=dict(graph.opset_imports),
            name=graph.name,
            metadata_props=dict(graph.metadata_props),
        )

    def _find(self, value: ir.Value) -> ir.Value:
        if value not in self._values:
            raise _Rare
        return self._values[value]

    def _find_source(self, value: ir.Value) -> ir.Value:
        return self._values[value] if value in self._values else self._copy_value(value)

    def _copy_value(self, value: ir.Value) -> ir.Value:
        if has_metadata(value) or value.metadata_props:
            raise _Rare
        copy = self._values[value] = ir.Value(
            name=value.name,
            shape=value.shape,
            type=value.type,
            doc_string=value.doc_string,
            const_value=value.const_value,
        )
        return copy

    def _copy_node(self, node: ir.Node) -> ir.Node:
        attributes = node.attributes.data.values()
        if any(each.type in _BODIES for each in attributes) or has_metadata(node):
            raise _Rare
        if node.device_configurations:
            raise _Rare
        return ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else self._find(value) for value in node.inputs],
            attributes,
            overload=node.overload,
            outputs=[self._copy_value(value) for value in node.outputs],
            version=node.version,
            name=node.name,
            doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )
