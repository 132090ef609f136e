"""Divide the forms of a prepared model at the tensors that the user named.

In the training form, named tensors that the loss does not need are left out.  Each party computes
sizes from tensors that it has.  This module does not depend on losses, gradients or ports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from splitonnx.errors import IntegerCut, NotACut, quote
from splitonnx.names import CLIENT, SERVER
from splitonnx.partitioner.cutting.cuts import Partition, divide, find_lost, survey
from splitonnx.partitioner.cutting.passes.given_names import resolve_names
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.cutting.sizes import derive_sizes
from splitonnx.partitioner.graphs.traversals import list_inputs, map_values, reads_size, walk_back
from splitonnx.partitioner.inference.inferences import Inference


def divide_training(
    prepared: PreparedModel,
    graph: ir.Graph,
    at: Sequence[str],
    tail_at: Sequence[str],
    outputs: Sequence[str],
) -> Partition:
    """Divide ``graph``, a copy of the training form, at the tensors that the user named.

    All outputs of ``graph`` except ``outputs`` are removed, and ``graph`` is rewritten so that each
    party computes sizes from its own tensors.

    Raises:
        CutError: the tensors do not exist or do not divide the graph.
    """
    cut = _resolve_cut(prepared, graph, at, tail_at)
    values = map_values(graph)
    graph.outputs[:] = [values[name] for name in dict.fromkeys(outputs)]
    first, last = (_keep_needed(graph, values) for values in cut)
    returned = keep_returned(graph, last)
    sent = keep_reached(graph, first, returned)
    return _divide(prepared, graph, sent, returned, is_training=True)


def divide_inference(
    prepared: PreparedModel, graph: ir.Graph, at: Sequence[str], tail_at: Sequence[str]
) -> Partition:
    """Divide ``graph``, a copy of the inference form, at the tensors that the user named.

    ``graph`` is rewritten so that each party computes sizes from its own tensors.

    Raises:
        CutError: the tensors do not exist or do not divide the graph.
    """
    return _divide(prepared, graph, *_resolve_cut(prepared, graph, at, tail_at))


def _resolve_cut(
    prepared: PreparedModel, graph: ir.Graph, at: Sequence[str], tail_at: Sequence[str]
) -> list[tuple[ir.Value, ...]]:
    """Find the tensors that ``at`` and ``tail_at`` name, and return them in this order.

    Raises:
        UnknownTensor: a name matches nothing.
        IntegerCut: gradients cannot reach trained parameters through a tensor of integers.
    """
    cut = [resolve_names(graph, names, prepared.given) for names in (at, tail_at)]
    for tensors in cut:
        lost = find_lost(tensors, prepared.trainable)
        if lost:
            value, parameters = lost
            raise IntegerCut(value.name or "", str(value.dtype), parameters)
    return cut


def _keep_needed(graph: ir.Graph, tensors: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the tensors of the cut that the loss depends on.

    The loss is computed from the outputs of ``graph``.

    Raises:
        NotACut: the loss depends on none of the tensors, so one party would have no part in
            training.
    """
    needed = find_needed(graph)
    kept = [value for value in tensors if value in needed]
    if tensors and not kept:
        names = quote([value.name or "" for value in graph.outputs])
        raise NotACut(
            [value.name or "" for value in tensors],
            reason=f"output {names}, from which the loss is computed, does not depend on them",
        )
    return kept


def keep_reached(
    graph: ir.Graph, first: Sequence[ir.Value], last: Sequence[ir.Value]
) -> Sequence[ir.Value]:
    """Return the tensors in ``first`` that the server reads for the loss, or all if it reads none.

    ``first`` holds the tensors that the client sends, and ``last`` those that the server sends
    back.  Tensors that are left out, such as a raw input that only another output needs, are sent
    only in prediction.
    """
    _, reached = walk_back(last or graph.outputs, set(first))
    return [value for value in first if value in reached] or first


def keep_returned(graph: ir.Graph, last: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """Return the tensors in ``last`` that the client reads for the loss, or all if it reads none.

    ``last`` holds the tensors that the server sends back.  Tensors that are left out, such as an
    output of the model that only the server reads on, are sent only in prediction.
    """
    _, reached = walk_back(graph.outputs, set(last))
    return [value for value in last if value in reached] or last


def find_needed(graph: ir.Graph) -> set[ir.Value]:
    """Return the outputs of a graph and all values that they depend on.

    Values that are used only for their sizes are left out.
    """
    nodes, _ = walk_back(graph.outputs, ends={node for node in graph if reads_size(node)})
    read = {value for node in nodes if not reads_size(node) for value in list_inputs(node)}
    return read | set(graph.outputs)


def _divide(
    prepared: PreparedModel,
    graph: ir.Graph,
    first: Sequence[ir.Value],
    last: Sequence[ir.Value],
    *,
    is_training: bool = False,
) -> Partition:
    known = Inference(graph.opset_imports[""])
    state, trainable = prepared.state, prepared.trainable
    around = None
    if first:
        around = survey(
            graph, state=state, trainable=trainable, known=known, is_training=is_training
        )
    try:
        partition = divide(graph, first, last, state=state, trainable=trainable, around=around)
    except NotACut as error:
        raise _explain(error, graph) from error
    return _keep_sizes_home(graph, partition, known)


def _explain(error: NotACut, graph: ir.Graph) -> NotACut:
    """Return a better error if nodes on both sides update the same running statistics."""
    values = map_values(graph)
    for name in error.missing:
        node = values[name].producer() if name in values else None
        if node is not None and node.op_type == "BatchNormalization" and values[name].index():
            return NotACut(
                error.tensors,
                reason=f"node '{node.name}' (BatchNormalization) and one on the other side update "
                "the same running statistics; cut where one party has both",
            )
    return error


def _keep_sizes_home(graph: ir.Graph, partition: Partition, known: Inference) -> Partition:
    """Make each party compute sizes from its own tensors by rewriting the graph in place."""
    if not partition.at:
        return partition
    remote_shapes, client = partition.remote_shapes, partition.client
    server = derive_sizes(
        graph, remote_shapes[SERVER], partition.server, client, SERVER, known, partition.duplicated
    )
    client = frozenset(derive_sizes(graph, remote_shapes[CLIENT], client, server, CLIENT, known))
    graph.sort()
    return replace(partition, server=frozenset(server), client=client)
