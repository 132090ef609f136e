"""Hide nodes from onnxruntime-training: remove them before it differentiates the graph.

The optimizer of version 1.19.2 prepares every node that it sees for training, whether a gradient
passes through it or not.  It turns LSTM and GRU into LSTMTraining and GRUTraining, which no other
runtime has.  In the bodies of If, Loop and Scan it turns an inference-mode BatchNormalization into
a training-mode one, which computes other values, and it refuses quantized operators there.  If no
gradient passes through such a node, its results can be treated as data: each result becomes a graph
input, and each value that the node reads becomes a graph output.  After differentiation the nodes
are inserted again unchanged.

This module handles names and messages; its caller has already decided where gradients pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from splitonnx.partitioner.graphs.transcripts import write_node
from splitonnx.partitioner.graphs.traversals import (
    disconnect,
    list_bodies,
    list_inner,
    list_inputs,
)

_RECURRENCES = frozenset({"GRU", "LSTM"})


@dataclass(frozen=True, kw_only=True)
class Opaques:
    """The nodes and values removed from a graph, as protobuf messages or by name.

    ``constants`` are constants that the nodes read and that the optimizer may drop or rename.
    ``exposed`` holds the names of outputs added only for these nodes.  ``results`` are the values
    that the nodes compute, and ``outputs`` the names of those that are graph outputs.
    """

    nodes: Sequence[onnx.NodeProto] = ()
    constants: Mapping[str, onnx.NodeProto | onnx.TensorProto]
    exposed: frozenset[str] = frozenset()
    results: Mapping[str, onnx.ValueInfoProto]
    outputs: Sequence[str] = ()


def is_opaque(node: ir.Node) -> bool:
    """Return whether a node without gradient must be hidden from onnxruntime-training."""
    return (node.op_type in _RECURRENCES and not node.domain) or bool(list_bodies(node))


def take_out_opaques(graph: ir.Graph) -> Opaques:
    """Remove every opaque node from a graph; no gradient may pass through one."""
    nodes = dict.fromkeys(node for node in graph if is_opaque(node))
    if not nodes:
        return Opaques(constants={}, results={})
    made = dict.fromkeys(value for node in nodes for value in node.outputs if value.name)
    read = dict.fromkeys(value for node in nodes for value in list_inputs(node))
    constants = [value for value in read if _is_constant(value)]
    known = {*graph.inputs, *graph.outputs, *made, *constants}
    exposed = [value for value in read if value not in known]
    outputs = [value for value in graph.outputs if value in made]
    taken = Opaques(
        nodes=[_write(node) for node in nodes],
        constants={_name(value): _write_constant(value) for value in constants},
        exposed=frozenset(map(_name, exposed)),
        results={_name(value): ir.serde.serialize_value(value) for value in made},
        outputs=[_name(value) for value in outputs],
    )
    graph.outputs[:] = [*(v for v in graph.outputs if v not in outputs), *exposed]
    disconnect(inner for node in nodes for inner in list_inner(node))
    disconnect(nodes)
    for value in made:
        stand_in = ir.Value(name=value.name, type=value.type, shape=value.shape)
        if value.uses():
            value.replace_all_uses_with(stand_in)
            graph.inputs.append(stand_in)
    graph.remove(nodes, safe=True)
    return taken


def put_back_opaques(graph: onnx.GraphProto, taken: Opaques) -> None:
    """Insert the removed nodes into the differentiated graph, which the caller must then sort."""
    _drop(graph.input, taken.results)
    _drop(graph.output, taken.exposed)
    known = {name for node in graph.node for name in node.output}
    known.update(tensor.name for tensor in graph.initializer)
    for name, constant in taken.constants.items():
        if name in known:
            continue
        if isinstance(constant, onnx.TensorProto):
            graph.initializer.append(constant)
        else:
            graph.node.append(constant)
    graph.node.extend(taken.nodes)
    graph.output.extend(taken.results[name] for name in taken.outputs)
    rest = [value for name, value in taken.results.items() if name not in taken.outputs]
    graph.value_info.extend(value for value in rest if value.HasField("type"))


def _drop(values: Any, names: Collection[str]) -> None:
    kept = [value for value in values if value.name not in names]
    del values[:]
    values.extend(kept)


def _name(value: ir.Value) -> str:
    return value.name or ""


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return node.op_type == "Constant" and not node.domain


def _write_constant(value: ir.Value) -> onnx.NodeProto | onnx.TensorProto:
    node = value.producer()
    if node is not None:
        return _write(node)
    assert value.const_value is not None
    tensor: onnx.TensorProto = ir.serde.serialize_tensor(value.const_value)
    tensor.name = value.name or ""
    return tensor


def _write(node: ir.Node) -> onnx.NodeProto:
    inputs = ["" if value is None else _name(value) for value in node.inputs]
    proto = write_node(node, inputs, [_name(value) for value in node.outputs])
    proto.name = node.name or ""
    return proto
