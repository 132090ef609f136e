"""Convert graphs to protobuf messages in a third of the time that onnx-ir takes.

The results are the same, byte for byte.  Less common content (metadata, functions, types other than
tensors) is written by onnx-ir itself.  A view of some of a graph's nodes yields the same message as
a clone of these nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from splitonnx.names import ADAPTERS
from splitonnx.operators import HIGHEST_IR_VERSION

_QUANTIZED = "quant_parameter_tensor_names"
"""Metadata key under which onnx-ir stores a value's quantization parameters."""
_Dims = tuple[int | str | None, ...]
_Type = tuple[ir.DataType, _Dims | None]


_Graph = ir.Graph | ir.GraphView


def write_model(model: ir.Model) -> onnx.ModelProto:
    """Convert a model to its protobuf message, like ``ir.to_proto``."""
    if model.functions or model.device_configurations:
        proto: onnx.ModelProto = ir.to_proto(model)
        return proto
    return _write(replace_graph(model, _copy_head(model.graph)), model.graph)


def replace_graph(model: ir.Model, graph: ir.Graph) -> ir.Model:
    """Return a copy of ``model`` that has ``graph`` as its graph, and no functions."""
    return ir.Model(
        graph,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        metadata_props=dict(model.metadata_props),
        device_configurations=model.device_configurations,
    )


def write_graph(graph: _Graph, ir_version: int, producer: str) -> onnx.ModelProto:
    """Convert a graph, or a view of some of its nodes, to the protobuf message of a model.

    ``producer`` is the name that the message gives as the model's producer.
    """
    head = ir.Model(_copy_head(graph), ir_version=ir_version, producer_name=producer)
    return _write(head, graph)


def serialize(graph: _Graph, used: Collection[str], note: str | None = None) -> bytes:
    """Serialize a graph that uses the domains ``used``; equal graphs yield equal bytes.

    ``note`` is the note about the graph's adapters, if it has any.
    """
    for domain in [domain for domain in graph.opset_imports if domain and domain not in used]:
        del graph.opset_imports[domain]
    proto = write_graph(graph, HIGHEST_IR_VERSION, "splitonnx")
    typed = [value for value in proto.graph.value_info if value.HasField("type")]
    constants = sorted(proto.graph.initializer, key=lambda tensor: tensor.name)
    del proto.graph.value_info[:], proto.graph.initializer[:]
    # onnx's checker refuses a value without a type
    proto.graph.value_info.extend(sorted(typed, key=lambda value: value.name))
    proto.graph.initializer.extend(constants)
    if note is not None:
        proto.metadata_props.add(key=ADAPTERS, value=note)
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _copy_head(graph: _Graph) -> ir.Graph:
    """Return an empty graph with the same name, opsets and metadata."""
    return ir.Graph(
        [],
        [],
        nodes=[],
        name=graph.name,
        doc_string=graph.doc_string,
        opset_imports=dict(graph.opset_imports),
        metadata_props=dict(graph.metadata_props),
    )


def _write(head: ir.Model, graph: _Graph) -> onnx.ModelProto:
    proto: onnx.ModelProto = ir.serde.serialize_model(head)
    _GraphWriter(proto.graph).write(graph)
    return proto


class _GraphWriter:
    """Converts one graph to its protobuf message; equal types are converted only once."""

    def __init__(self, proto: onnx.GraphProto) -> None:
        self._proto = proto
        self._types: dict[_Type, onnx.TypeProto] = {}
        self._shapes: dict[int, tuple[ir.Shape, _Dims | None]] = {}

    def write(self, graph: _Graph) -> None:
        proto, inputs = self._proto, {value.name for value in graph.inputs}
        outputs, stored = set(graph.outputs), list(graph.initializers.values())
        self._declare(proto.input, graph.inputs)
        self._annotate(value for value in graph.inputs if value.name not in graph.initializers)
        self._annotate(stored)
        self._declare(proto.value_info, [v for v in stored if _is_noted(v, inputs)])
        for value in stored:
            tensor = value.const_value
            if tensor is not None:
                tensor.name = value.name
                ir.serde.serialize_tensor_into(proto.initializer.add(), tensor)
        for node in graph:
            _write_node(proto, node)
            inner = [value for value in node.outputs if value not in outputs]
            self._declare(proto.value_info, [value for value in inner if _is_noted(value)])
            self._annotate(inner)
        self._declare(proto.output, graph.outputs)
        self._annotate(graph.outputs)

    def _annotate(self, values: Iterable[ir.Value]) -> None:
        for value in values:
            parameters = value.meta.get(_QUANTIZED) if has_metadata(value) else None
            if parameters:
                entry = self._proto.quantization_annotation.add(tensor_name=value.name)
                for key, name in sorted(parameters.items()):
                    entry.quant_parameter_tensor_names.add(key=key, value=name)

    def _declare(self, entries: Any, values: Iterable[ir.Value]) -> None:
        for value in values:
            kind = self._read_type(value)
            if kind is None:
                ir.serde.serialize_value_into(entries.add(), value)
                continue
            if kind not in self._types:
                self._types[kind] = ir.serde.serialize_value(value).type
            entries.add(name=value.name, type=self._types[kind])

    def _read_type(self, value: ir.Value) -> _Type | None:
        """Return a value's type and shape, or ``None`` if onnx-ir must write the value."""
        kind, shape = value.type, value.shape
        if not isinstance(kind, ir.TensorType) or kind.denotation:
            return None
        if value.metadata_props or value.doc_string:
            return None
        if shape is None:
            return kind.dtype, None
        if id(shape) not in self._shapes:  # the entry keeps the shape, so no other gets its id
            self._shapes[id(shape)] = shape, _read_dims(shape)
        dims = self._shapes[id(shape)][1]
        return None if dims is None else (kind.dtype, dims)


def _read_dims(shape: ir.Shape) -> _Dims | None:
    """Return a shape's dimensions, or ``None`` if any dimension has a denotation."""
    if any(shape.get_denotation(axis) for axis in range(len(shape))):
        return None
    return tuple(d if isinstance(d, int) else d.value for d in shape)


def has_metadata(noted: ir.Value | ir.Node | ir.Graph) -> bool:
    """Return whether a value, node or graph has entries in its property ``meta``.

    The property is not read if it does not exist yet, because reading it would create it.
    """
    return getattr(noted, "_metadata", noted) is not None and bool(noted.meta)


def _is_noted(value: ir.Value, known: Collection[str | None] = ()) -> bool:
    """Return whether a value needs an entry in ``value_info``.

    A value needs no entry if it has no name, if its name is in ``known``, or if it has no type,
    shape, description or metadata.
    """
    if not value.name or value.name in known:
        return False
    noted = value.type is not None or value.shape is not None
    return noted or bool(value.metadata_props or value.doc_string)


def _write_node(graph: onnx.GraphProto, node: ir.Node) -> None:
    if node.metadata_props or node.doc_string or node.overload or node.device_configurations:
        ir.serde.serialize_node_into(graph.node.add(), node)
        return
    outputs = [value.name for value in node.outputs]
    while outputs and not outputs[-1]:
        outputs.pop()
    proto = graph.node.add()
    _fill_node(proto, node, ["" if v is None else v.name for v in node.inputs], outputs)
    if node.name:
        proto.name = node.name


def write_node(node: ir.Node, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.NodeProto:
    """Convert a node to its protobuf message, with the given names of inputs and outputs."""
    proto = onnx.NodeProto()
    _fill_node(proto, node, inputs, outputs)
    if node.overload:
        proto.overload = node.overload
    return proto


def _fill_node(
    proto: onnx.NodeProto, node: ir.Node, inputs: Sequence[Any], outputs: Sequence[Any]
) -> None:
    """Fill ``proto`` with a node's operator, attributes and the given input and output names."""
    proto.op_type = node.op_type
    proto.input.extend(inputs)
    proto.output.extend(outputs)
    if node.domain:
        proto.domain = node.domain
    for attribute in node.attributes.data.values():
        if attribute.is_ref():
            ir.serde.serialize_reference_attribute_into(proto.attribute.add(), attribute)
        else:
            ir.serde.serialize_attribute_into(proto.attribute.add(), attribute)
