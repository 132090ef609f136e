"""Insert nodes that compute nothing and that ONNX Runtime's optimizer does not merge or remove.

The optimizer removes Identity nodes, so the functions here skip them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder


def insert_barrier(node: ir.Node, index: int) -> None:
    """Insert a Sum of a single tensor before the input of ``node`` at ``index``.

    Such a Sum returns its input unchanged.  The optimizer removes an Identity, but not a Sum, so it
    cannot merge ``node`` with the node before it.
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
    """Follow ``value`` back through nodes of types in ``kinds``; return the value before them."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in kinds and not node.domain:
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return value


def find_producer(
    value: ir.Value | None, kind: str, kinds: Collection[str] = ("Identity",)
) -> ir.Node | None:
    """Return the node that computes ``value`` if it has the type ``kind``, or ``None``.

    Nodes of the types ``kinds`` between this node and ``value`` are skipped.
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
