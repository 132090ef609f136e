"""Hide some nodes from onnxruntime-training while it differentiates the graph.

The graph optimizer of version 1.19.2 prepares every node for training, even if no gradient passes
through the node.  LSTM and GRU become LSTMTraining and GRUTraining, which no other runtime
supports.  In the subgraph bodies of If, Loop and Scan, a BatchNormalization in inference mode is
switched to training mode, which changes its results, and quantized operators are refused.  A
sequence cannot be an input or output of the graph that is differentiated.

LSTM, GRU, nodes with subgraph bodies, nodes that read or make sequences or optional values, and
nodes that are marked as hidden are called *opaque* here.
If no gradient passes through an opaque node, its results can be treated as data.  The node is then
removed: its results become graph inputs, and the values that it reads become graph outputs.  After
differentiation, the node is inserted again unchanged.  The caller must make sure that no gradient
passes through opaque nodes, except where it supplies that gradient itself
(:mod:`supplied_gradients`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import HIDDEN
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
    """The nodes removed from a graph, and the values that connect them to the graph.

    ``constants`` holds the constants that the nodes read, because the graph optimizer may drop or
    rename these constants.  ``exposed`` names the graph outputs that were added only for these
    nodes.  ``results`` holds the values that the nodes compute.  ``outputs`` names the results that
    are graph outputs.
    """

    nodes: Sequence[onnx.NodeProto] = ()
    constants: Mapping[str, onnx.NodeProto | onnx.TensorProto]
    exposed: frozenset[str] = frozenset()
    results: Mapping[str, onnx.ValueInfoProto]
    outputs: Sequence[str] = ()


def is_opaque(node: ir.Node) -> bool:
    """Return whether a node is opaque.

    This is an LSTM, a GRU, one with subgraph bodies, with values that are not tensors, or hidden.
    """
    is_recurrent = node.op_type in _RECURRENCES and not node.domain
    if is_recurrent or HIDDEN in node.metadata_props or list_bodies(node):
        return True
    values = (*node.inputs, *node.outputs)
    kinds = (value.type for value in values if value is not None)
    return any(kind is not None and not isinstance(kind, ir.TensorType) for kind in kinds)


def take_out_opaques(graph: ir.Graph) -> Opaques:
    """Remove every opaque node from a graph, and return what is needed to insert them again.

    A gradient may pass through an opaque node only if the caller supplies it.
    """
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
    """Insert the nodes that :func:`take_out_opaques` removed into the differentiated graph.

    The nodes are appended, so the caller must sort the graph.
    """
    _drop(graph.input, taken.results)
    hidden = [value for value in graph.output if value.name in taken.exposed]
    graph.value_info.extend(value for value in hidden if value.HasField("type"))  # a copy of each
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
