"""Insert barriers into a graph, and find the nodes that they separate.

A barrier is a node that returns its input unchanged and that ONNX Runtime's optimizer neither
merges nor removes.  The optimizer removes Identity nodes, so the functions that find nodes skip
them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder


def insert_barrier(node: ir.Node, index: int) -> None:
    """Insert a barrier, a Sum with one operand, before the input of ``node`` at ``index``.

    A Sum with one operand returns it unchanged.  The optimizer does not remove this Sum, so it
    cannot merge ``node`` with the node before the barrier.
    """
    graph, value = node.graph, node.inputs[index]
    assert graph is not None
    assert value is not None
    name = f"{node.outputs[0].name}/barrier_{index}"
    while value.name and value.name.startswith(f"{name}/"):  # the gradient builder's Identity
        name += "_"
    builder = NodeBuilder(name)
    apart = builder.op("Sum", value)
    apart.type, apart.shape = value.type, value.shape
    graph.insert_before(node, builder.nodes)
    node.replace_input_with(index, apart)


def skip(value: ir.Value | None, kinds: Collection[str] = ("Identity",)) -> ir.Value | None:
    """Follow ``value`` back through nodes with types in ``kinds``; return the value before them."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in kinds and not node.domain:
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return value


def find_producer(
    value: ir.Value | None, kind: str, kinds: Collection[str] = ("Identity",)
) -> ir.Node | None:
    """Return the node that computes ``value``, or ``None`` if it does not have the type ``kind``.

    Nodes with a type in ``kinds`` between that node and ``value`` are skipped.
    """
    source = skip(value, kinds)
    node = None if source is None else source.producer()
    return node if node is not None and node.op_type == kind and not node.domain else None


def list_readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield each node that reads ``value``, and the index of the input; skip Identity nodes."""
    for reader, index in list(value.uses()):
        if reader.op_type == "Identity" and not reader.domain:
            yield from list_readers(reader.outputs[0])
        else:
            yield reader, index
