"""Iterate over the nodes, graphs and tensors in a model's protobuf messages.

The subgraph bodies of control-flow nodes are included.  Protocol Buffers limits their nesting to
100 levels.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from splitonnx.errors import UnsupportedModel

_Nodes: TypeAlias = Any
"""A repeated field of nodes, whose type protobuf's stubs do not export."""


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


def sort_nodes(model: ModelProto) -> ModelProto:
    """Return a model with every node behind the nodes that make what it and its bodies read.

    ``quantize_dynamic`` puts what it computes of an outer tensor behind the If or Loop whose body
    reads it.  Nodes keep their order otherwise.  A model in order is returned itself, and another
    one is copied.  Nodes of a cycle, and those that read their results, come last, and the first of
    them is in a cycle.
    """
    if all(_list_order(nodes) == list(range(len(nodes))) for nodes in _list_sequences(model)):
        return model
    ordered = ModelProto()
    ordered.CopyFrom(model)
    for nodes in _list_sequences(ordered):
        copies = [NodeProto() for _ in nodes]
        for copy, index in zip(copies, _list_order(nodes), strict=True):
            copy.CopyFrom(nodes[index])
        del nodes[:]
        nodes.extend(copies)
    return ordered


def _list_sequences(model: ModelProto) -> Iterator[_Nodes]:
    """Yield the nodes of each graph, body and function, those of a body before those around it."""
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        yield from _list_nested(nodes)


def _list_nested(nodes: _Nodes) -> Iterator[_Nodes]:
    for node in nodes:
        for body in list_bodies(node):
            yield from _list_nested(body.node)
    yield nodes


def _list_order(nodes: _Nodes) -> list[int]:
    """List the indices of nodes, each after those of the nodes that make what it reads."""
    makers: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in filter(None, node.output):
            makers.setdefault(name, index)
    read = [{makers[name] for name in _list_reads(node) if name in makers} for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for index, found in enumerate(read):
        for maker in found:
            readers[maker].append(index)
    missing = list(map(len, read))
    ready = [index for index, count in enumerate(missing) if not count]
    order: list[int] = []
    while ready:  # a heap: the first of those that can come next
        order.append(heapq.heappop(ready))
        for reader in readers[order[-1]]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, reader)
    if len(order) == len(nodes):
        return order
    left = set(range(len(nodes))).difference(order)
    passed: set[int] = set()
    index = min(left)
    while index not in passed:  # of what is left, each reads another one
        passed.add(index)
        index = min(read[index] & left)
    return [*order, index, *sorted(left - {index})]


def _list_reads(node: NodeProto) -> set[str]:
    """Return the names that a node reads, with what its bodies read of the graphs around them."""
    names = set(filter(None, node.input))
    for body in list_bodies(node):
        own = {value.name for value in (*body.input, *body.initializer)}
        own.update(name for inner in body.node for name in inner.output)
        inner_reads = (name for inner in body.node for name in _list_reads(inner))
        names |= {*inner_reads, *(value.name for value in body.output)} - own
    return names


def _refuse_sparse(name: str) -> None:
    raise UnsupportedModel(f"sparse tensor '{name}'", "sparse weights are not taken")


def label_node(node: NodeProto) -> str:
    """Return a label for error messages: the node's name, or else an output's, and its operator."""
    name = node.name or next((output for output in node.output if output), "")
    return f"node '{name}' ({node.op_type})"
