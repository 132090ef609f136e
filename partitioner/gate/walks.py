"""Iterate over the nodes, graphs and tensors in a model's protobuf messages.

The subgraph bodies of control-flow nodes are included.  Protocol Buffers limits their nesting to
100 levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from splitonnx.errors import UnsupportedModel


def list_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield the given nodes, each followed by the nodes in its subgraph bodies."""
    for node in nodes:
        yield node
        for body in list_bodies(node):
            yield from list_nodes(body.node)


def list_bodies(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the subgraph bodies of a node, such as the branches of an If or the body of a Loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def list_all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Yield all nodes of a model, including nodes in subgraph bodies and in functions."""
    yield from list_nodes(model.graph.node)
    for function in model.functions:
        yield from list_nodes(function.node)


def list_graphs(model: ModelProto) -> Iterator[GraphProto]:
    """Yield a model's graph and all subgraph bodies, including those in functions."""
    yield model.graph
    for node in list_all_nodes(model):
        yield from list_bodies(node)


def list_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield all tensors of a model: initializers and tensors in attributes.

    Raises:
        UnsupportedModel: a tensor is sparse.
    """
    for graph in list_graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            _refuse_sparse(sparse.values.name)
    for node in list_all_nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                _refuse_sparse(attribute.name)


def _refuse_sparse(name: str) -> None:
    raise UnsupportedModel(f"sparse tensor '{name}'", "sparse weights are not taken")


def label_node(node: NodeProto) -> str:
    """Return a label for error messages: the node's name, or else an output's, and its operator."""
    name = node.name or next((output for output in node.output if output), "")
    return f"node '{name}' ({node.op_type})"
