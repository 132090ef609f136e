"""Separate a loss that is part of a model from what the model predicts.

A model that ends in its own loss reads its labels as an input.  If it has other outputs, and the
loss is computed from these and from the labels alone, then prediction needs neither the loss nor
the labels: the client computes the loss from the predictions, as for a loss that is not part of the
model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import onnx_ir as ir

from splitonnx.losses import FROM_MODEL, Loss
from splitonnx.partitioner.cutting.passes.given_names import resolve_names
from splitonnx.partitioner.cutting.ports import declare
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.differentiation.loss_arrays import LossGraph, LossGraphs
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.graphs.traversals import map_values, prune, walk_back


@attribute_errors_to_pass("separated from its loss")
def separate_losses(
    prepared: PreparedModel, losses: Sequence[Loss], cut: Sequence[str]
) -> tuple[PreparedModel, LossGraphs]:
    """Return the model without its losses where it predicts, and these losses by output.

    Nothing is separated if the model has no other output, if a loss is computed from more than
    other outputs and inputs of its own, or if ``cut`` names a tensor within a loss.
    """
    names = {loss.output or "" for loss in losses if loss.kind == FROM_MODEL}
    graph = prepared.inference.graph
    kept = [value for value in graph.outputs if value.name not in names]
    own = [value for value in graph.outputs if value.name in names]
    if not own or not kept:
        return prepared, {}
    predicting, sources = walk_back(kept)
    used = sources.union(*(node.outputs for node in predicting))
    found: dict[bytes | str, LossGraph] = {}
    for value in own:
        nodes, ends = walk_back([value], stop=kept)
        labels = [end for end in ends if end not in kept]
        if any(end in used or end.name in prepared.state for end in labels) or value in used:
            return prepared, {}
        if not ends.intersection(kept) or not nodes:
            return prepared, {}
        found[value.name or ""] = _extract(prepared.inference, value.name or "", ends, kept)
    trimmed = copy_model(prepared.inference)
    drop_losses(trimmed.graph, names)
    left = map_values(trimmed.graph)
    lost = [v for v in resolve_names(graph, cut, prepared.given) if v.name not in left]
    if any(value.producer() is not None for value in lost):
        return prepared, {}
    return replace(prepared, inference=trimmed), found


def list_predicted(prepared: PreparedModel, names: Sequence[str], full: PreparedModel) -> list[str]:
    """Return the names of a cut without labels that are not an input of ``prepared`` any more."""
    left = map_values(prepared.inference.graph)
    cut = []
    for name in names:
        values = resolve_names(full.inference.graph, [name], full.given)
        kept = [value.name or "" for value in values if value.name in left]
        cut += [name] if len(kept) == len(values) else kept
    return cut


def drop_losses(graph: ir.Graph, names: Collection[str]) -> None:
    """Remove outputs from a graph, and the nodes and inputs that only they need, in place."""
    idle = {value for value in graph.inputs if not value.uses()}
    graph.outputs[:] = [value for value in graph.outputs if value.name not in names]
    prune(graph)
    graph.inputs[:] = [
        value for value in graph.inputs if value.uses() or value in idle or value.is_graph_output()
    ]


def _extract(
    model: ir.Model, name: str, ends: Collection[ir.Value], kept: Sequence[ir.Value]
) -> LossGraph:
    """Return a loss as a graph of its own, whose inputs are ``ends``."""
    reads = tuple(value.name or "" for value in kept if value in ends)
    labels = [v for v in model.graph.inputs if v in ends and v.name not in reads]
    copied = copy_model(model)
    values = map_values(copied.graph)
    copied.graph.outputs[:] = [values[name]]
    for read in reads:
        old = values[read]
        new = ir.Value(name=read, type=old.type, shape=old.shape)
        ir.convenience.replace_all_uses_with(old, new)
        if old.name == new.name and old.producer() is not None:
            old.name = f"{read}.predicted"
        if old in copied.graph.inputs:
            copied.graph.inputs.remove(old)
        copied.graph.inputs.append(new)
    prune(copied.graph)
    wanted = {*reads, *(value.name for value in labels)}
    copied.graph.inputs[:] = [v for v in copied.graph.inputs if v.name in wanted]
    return LossGraph(
        training=copied,
        inference=copied,
        outputs=reads,
        arrays=tuple(map(declare, labels)),
        weights={},
    )
