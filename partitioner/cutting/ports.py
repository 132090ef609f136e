"""Insert ports before differentiation: an Identity node for each tensor that the parties exchange.

For a tensor ``t``, the port's output is named after the receiver: ``t@server`` or ``t@client``.
Only the receiver's nodes read this output.  So the gradient of the output is a separate tensor that
contains only the receiver's contribution, and this is the gradient that the receiver sends back.
This module does not compute gradients.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.element_types import ELEMENT_TYPES
from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.manifests import WireKind
from splitonnx.names import CLIENT, SERVER
from splitonnx.partitioner.cutting.cuts import Partition
from splitonnx.partitioner.graphs.traversals import list_inner
from splitonnx.partitioner.inference.dimensions import name_unknown
from splitonnx.partitioner.inference.undecided_sizes import explain_unknown_rank
from splitonnx.tensors import DTYPES, TensorSpec

_DTYPE_NAMES = {ir.DataType(kind.code): kind.name for kind in ELEMENT_TYPES}


@dataclass(frozen=True, kw_only=True)
class Port:
    """An inserted port: its output (the tensor to send), its sender, its receiver and its kind."""

    value: ir.Value
    sender: str
    receiver: str
    kind: WireKind


def declare(value: ir.Value, name: str | None = None) -> TensorSpec:
    """Return the manifest entry of a graph's value, with generated names for unnamed dimensions.

    ``name`` is the name in the entry; by default, it is the value's own name.

    Raises:
        UsageError: the value is not a tensor, its shape is not known, or its element type cannot be
            sent.
    """
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        raise UsageError(
            f"'{_name_sent(value)}' cannot travel: it is a sequence or an optional value, not a "
            "tensor; cut before the node that makes it, or behind those that read it"
        )
    if value.dtype not in _DTYPE_NAMES or value.shape is None:
        raise UsageError(
            f"tensor '{_name_sent(value)}' cannot travel: its dtype is {value.dtype}, its shape "
            f"{value.shape}; cut where both are known (one of {', '.join(DTYPES)})"
        )
    dims = tuple(
        d if isinstance(d, int) else d.value or str(name_unknown(value.name or "", axis))
        for axis, d in enumerate(value.shape)
    )
    return TensorSpec(name=name or value.name or "", dtype=_DTYPE_NAMES[value.dtype], shape=dims)


def declare_end(value: ir.Value, end: str) -> TensorSpec:
    """Return the manifest entry of an ``input`` or ``output`` of the model.

    Raises:
        UnsupportedModel: its shape is not known, or its element type is not one that data can have.
    """
    try:
        return declare(value)
    except UsageError as error:
        advice = f"export the model without this {end} if it is not needed"
        if value.shape is None:
            reason = "the number of its dimensions is not known"
            explained = explain_unknown_rank(value)
            advice = f"{explained}; or {advice}" if explained else advice
        else:
            reason = f"its elements are {value.dtype}, and data are {', '.join(DTYPES)}"
        name = _name_sent(value)
        raise UnsupportedModel(f"the model's {end} '{name}'", reason, advice) from error


def _name_sent(value: ir.Value) -> str:
    """Return the model's name of a value, which may be the output of a port."""
    return (value.name or "").removesuffix(f"@{SERVER}").removesuffix(f"@{CLIENT}")


def insert_ports(
    graph: ir.Graph,
    partition: Partition,
    server: Collection[ir.Node],
    arrays: Collection[str] = (),
) -> list[Port]:
    """Insert a port for every cut tensor of ``partition``, and for arrays that the server reads.

    ``server`` holds the server's nodes in the partition, and the nodes of the loss if the server
    computes the loss.  ``arrays`` names what the loss reads beside the model's outputs: labels and
    weights of samples.  Return the inserted ports.
    """
    ports = []
    for value in partition.at:
        raw = value.producer() is None
        kind = WireKind.INPUT if raw else WireKind.ACTIVATION
        ports.append(_insert(graph, value, value.name or "", CLIENT, kind, server))
    for value in partition.tail_at:
        name = value.name or ""
        if value.is_graph_output():
            value = _split_output(graph, value, server)
        ports.append(_insert(graph, value, name, SERVER, WireKind.ACTIVATION, server))
    for value in [v for v in graph.inputs if v.name in arrays]:
        if any(use.node in server for use in value.uses()):
            ports.append(_insert(graph, value, value.name or "", CLIENT, WireKind.INPUT, server))
    return ports


def _insert(
    graph: ir.Graph,
    value: ir.Value,
    name: str,
    sender: str,
    kind: WireKind,
    server: Collection[ir.Node],
) -> Port:
    """Insert an Identity after ``value``, and connect the receiver's nodes to its output."""
    receiver = SERVER if sender == CLIENT else CLIENT
    name = f"{name}@{receiver}"
    port = ir.node("Identity", [value], name=f"{name}/port")
    wire = port.outputs[0]
    wire.name, wire.type, wire.shape = name, value.type, value.shape
    holders = _map_holders(graph)
    for use in list(value.uses()):
        reader = holders.get(use.node, use.node)
        if reader is not port and (reader in server) is (receiver == SERVER):
            use.node.replace_input_with(use.idx, wire)
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, port)
    else:
        first = next(iter(graph))
        graph.insert_before(first, port)
    return Port(value=wire, sender=sender, receiver=receiver, kind=kind)


def _split_output(graph: ir.Graph, value: ir.Value, server: Collection[ir.Node]) -> ir.Value:
    """Add an Identity for the client's copy of a cut tensor that is also a model output.

    The Identity's output takes the name of ``value``; ``value`` itself is renamed and returned.
    The server's nodes continue to read ``value``.
    """
    name = value.name
    value.name = f"{name}.body"
    identity = ir.node("Identity", [value], name=f"{name}/tail")
    output = identity.outputs[0]
    output.name, output.type, output.shape = name, value.type, value.shape
    holders = _map_holders(graph)
    for use in list(value.uses()):
        reader = holders.get(use.node, use.node)
        if use.node is not identity and reader not in server:
            use.node.replace_input_with(use.idx, output)
    graph.outputs[list(graph.outputs).index(value)] = output
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, identity)
    return value


def _map_holders(graph: ir.Graph) -> dict[ir.Node, ir.Node]:
    """Map each node in a body to the graph's node that holds it."""
    return {inner: node for node in graph for inner in list_inner(node)}
