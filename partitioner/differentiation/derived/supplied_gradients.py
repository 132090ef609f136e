"""Insert gradients that onnxruntime-training does not know how to compute.

For some nodes, such as a Scan, the gradient builder has no gradient, but this package can write it
as nodes.  Such a node is hidden from the builder (:mod:`opaques`).  Its outputs then are graph
inputs, and the builder computes their gradients as it does for parameters.  Each value that the
node reads gets a copy whose gradient is a graph input.  The builder passes this gradient on to
whatever computes the value.  Afterwards, the nodes that compute the latter gradients from the
former are inserted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from splitonnx.partitioner.graphs.transcripts import write_node

GRADIENT = "_grad"
"""Suffix of a gradient's name: the gradient builder names the gradient of ``x`` ``x_grad``."""


@dataclass(frozen=True, kw_only=True)
class SuppliedGradients:
    """The nodes that compute gradients for nodes that are hidden from the gradient builder.

    ``nodes`` read the gradients of ``results``, which are values that hidden nodes compute.  They
    compute the gradients of ``arguments``, which are copies of values that hidden nodes read.  Each
    argument is a graph output, and its gradient is a graph input until the nodes are inserted.
    ``declarations`` are the known types and shapes of what the nodes compute.
    """

    nodes: Sequence[onnx.NodeProto] = ()
    declarations: Sequence[onnx.ValueInfoProto] = ()
    results: Sequence[str] = ()
    arguments: Sequence[str] = ()

    def join(self, other: SuppliedGradients) -> SuppliedGradients:
        """Return these gradients and those of ``other``."""
        return SuppliedGradients(
            nodes=[*self.nodes, *other.nodes],
            declarations=[*self.declarations, *other.declarations],
            results=[*self.results, *other.results],
            arguments=[*self.arguments, *other.arguments],
        )


NONE = SuppliedGradients()
"""No gradients: none passes through any hidden node."""


def add_argument(graph: ir.Graph, value: ir.Value, gradient: ir.Value) -> str:
    """Add a copy of ``value`` to a graph, with its gradient as an input; return the copy's name.

    ``gradient`` is what the gradient will be named after.
    """
    name = (gradient.name or "").removesuffix(GRADIENT)
    copy = ir.Value(name=name, type=value.type, shape=value.shape)
    graph.append(ir.Node("", "Identity", [value], outputs=[copy], name=name))
    graph.outputs.append(copy)
    graph.inputs.append(ir.Value(name=gradient.name, type=value.type, shape=value.shape))
    return name


def write_nodes(nodes: Iterable[ir.Node]) -> list[onnx.NodeProto]:
    """Return nodes as protobuf messages."""
    protos = []
    for node in nodes:
        inputs = ["" if value is None else value.name or "" for value in node.inputs]
        proto = write_node(node, inputs, [value.name or "" for value in node.outputs])
        proto.name = node.name or ""
        protos.append(proto)
    return protos


def put_back_gradients(graph: onnx.GraphProto, supplied: SuppliedGradients) -> None:
    """Insert the nodes of ``supplied`` into a graph with the gradients that the builder made.

    The nodes are appended, so the caller must sort the graph.
    """
    made = {f"{name}{GRADIENT}" for name in supplied.arguments}
    read = {f"{name}{GRADIENT}" for name in supplied.results}
    inputs = [value for value in graph.input if value.name not in made]
    hidden = [value for value in graph.output if value.name in read | {*supplied.arguments}]
    outputs = [value for value in graph.output if value not in hidden]
    del graph.input[:], graph.output[:]
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    graph.value_info.extend(value for value in hidden if value.HasField("type"))
    graph.value_info.extend(supplied.declarations)
    graph.node.extend(supplied.nodes)
