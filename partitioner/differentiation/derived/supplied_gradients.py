"""Insert gradients that onnxruntime-training does not know how to compute.

For some nodes, such as a Scan, the gradient builder has no gradient, but this package can write it
as nodes.  Such a node is hidden from the builder (:mod:`opaques`).  Its outputs then are graph
inputs, and the builder computes their gradients as it does for parameters.  Each value that the
node reads gets a copy whose gradient is a graph input.  The builder passes this gradient on to
whatever computes the value.  Afterwards, the nodes that compute the latter gradients from the
former are inserted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

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


NONE = SuppliedGradients()
"""No gradients: none passes through any hidden node."""


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
