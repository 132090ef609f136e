"""Split a joint graph into stages: the graphs that a party runs between two messages.

Every party has targets: the tensors that it sends (its wires), its gradients and its results.  A
walk back from the targets, which stops at received tensors, finds the party's nodes.  A value's
*level* is the number of wires on the longest path to it.  This is the number of messages that must
arrive, one after the other, before the value can be computed.  Nodes are grouped into stages by
level.  A node belongs to the first stage that needs it, and a value that a later stage of the same
party needs again is kept for that stage.  Only values that depend on constants alone are computed
twice, and only wires are sent.  A value that no message precedes belongs to the first stage that
sends something, since the server does nothing before the first message.

Forward and backward graphs are treated in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.manifests import WireKind
from splitonnx.partitioner.graphs.traversals import list_inputs, walk_back
from splitonnx.tensors import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A value of the graph that one party sends to the other."""

    value: ir.Value
    sender: str
    receiver: str


@dataclass(frozen=True, kw_only=True)
class WireSpec:
    """A tensor that the parties exchange, with its sender, its receiver and its manifest entry.

    ``tells_labels`` means that it is a gradient from which the server can compute the labels
    (:mod:`label_traces`); ``tells_inputs`` means the same of the labels of a loss that is part of
    the model, which are inputs.
    """

    crossing: Crossing
    tensor: TensorSpec
    kind: WireKind
    tells_labels: bool = False
    tells_inputs: bool = False


@dataclass(frozen=True, kw_only=True)
class StageCut:
    """One stage of one party: a view of its nodes in the joint graph.

    ``level`` is the number of messages that must arrive, one after the other, before this stage.
    """

    party: str
    level: int
    view: ir.GraphView

    def extract(self) -> ir.Graph:
        """Return a copy of the stage's graph that is independent of the joint graph.

        It lacks those of the joint graph's Identity nodes whose input can have the name of their
        output.  ONNX Runtime would copy each such tensor, which is as large as what is sent.
        """
        graph = self.view.clone()
        for node in list(graph):
            if node.op_type == "Identity" and not node.domain:
                _remove_identity(graph, node)
        return graph

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs."""
        return tuple(value.name or "" for value in self.view.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs."""
        return tuple(value.name or "" for value in self.view.outputs)


def _remove_identity(graph: ir.Graph, node: ir.Node) -> None:
    """Remove an Identity node, unless its input and its output must both have their names."""
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    if result.is_graph_output():
        maker = source.producer()
        if maker is None or maker.graph is not graph or source.is_graph_output():
            return
        name, result.name = result.name, None
        source.name = name
        source.type, source.shape = source.type or result.type, source.shape or result.shape
        graph.outputs[graph.outputs.index(result)] = source
    result.replace_all_uses_with(source)
    graph.remove(node, safe=True)


def cut_stages(
    graph: ir.Graph, crossings: Sequence[Crossing], targets: Mapping[str, Sequence[ir.Value]]
) -> list[StageCut]:
    """Split ``graph`` into stages and return them in an order in which they can run.

    ``crossings`` lists the values that the parties send to each other.  ``targets`` maps each party
    to the values that it must compute besides the values it sends.
    """
    received = {party: {c.value for c in crossings if c.receiver == party} for party in targets}
    wanted = {
        party: list(dict.fromkeys([*(c.value for c in crossings if c.sender == party), *values]))
        for party, values in targets.items()
    }
    nodes = {party: walk_back(wanted[party], stop=received[party])[0] for party in targets}
    levels = _find_levels(graph, crossings, nodes, received)
    stages = []
    for party in targets:
        sent = [levels.get((party, c.value), 0) for c in crossings if c.sender == party]
        first = min(sent, default=0)
        stages += _cut_party(graph, party, wanted[party], first, levels, received[party])
    return sorted(stages, key=lambda stage: stage.level)


def _find_levels(
    graph: ir.Graph,
    crossings: Sequence[Crossing],
    nodes: Mapping[str, Collection[ir.Node]],
    received: Mapping[str, Collection[ir.Value]],
) -> dict[tuple[str, ir.Value], int]:
    """Compute the level of each value that a party computes; the keys are (party, value)."""
    senders = {crossing.value: crossing.sender for crossing in crossings}
    levels: dict[tuple[str, ir.Value], int] = {}

    def find(party: str, value: ir.Value) -> int:
        if value in received[party]:
            return levels.get((senders[value], value), 0) + 1
        return levels.get((party, value), 0)

    for node in graph:  # in topological order, so every input's level is known
        for party, own in nodes.items():
            if node in own:
                level = max((find(party, value) for value in list_inputs(node)), default=0)
                levels.update(((party, value), level) for value in node.outputs)
    return levels


def _cut_party(
    graph: ir.Graph,
    party: str,
    wanted: Sequence[ir.Value],
    first: int,
    levels: Mapping[tuple[str, ir.Value], int],
    received: Collection[ir.Value],
) -> list[StageCut]:
    """Return the stages of one party, the first of which is at the level ``first``."""
    assigned: dict[ir.Node, int] = {}
    by_level: dict[int, list[ir.Value]] = {}
    for value in wanted:
        level = max(levels.get((party, value), 0), first)
        by_level.setdefault(level, []).append(value)
    for level in sorted(by_level):
        needed, _ = walk_back(by_level[level], stop=received)
        assigned.update((node, level) for node in needed if node not in assigned)

    consumers: dict[ir.Value, set[int]] = {}
    for node, level in assigned.items():
        for value in list_inputs(node):
            consumers.setdefault(value, set()).add(level)

    stages = []
    for level in sorted(set(assigned.values())):
        own = [node for node in graph if assigned.get(node) == level]
        stages.append(_view_stage(graph, party, level, own, by_level.get(level, []), consumers))
    return stages


def _view_stage(
    graph: ir.Graph,
    party: str,
    level: int,
    own: Sequence[ir.Node],
    targets: Sequence[ir.Value],
    consumers: Mapping[ir.Value, Collection[int]],
) -> StageCut:
    made = dict.fromkeys(value for node in own for value in node.outputs)
    read = dict.fromkeys(value for node in own for value in list_inputs(node))
    inputs = [value for value in read if value not in made and not value.is_initializer()]
    wanted = set(targets)
    outputs = [
        value
        for value in made
        if value.name and (value in wanted or any(at > level for at in consumers.get(value, ())))
    ]
    view = ir.GraphView(
        inputs,
        outputs,
        nodes=own,
        initializers=[value for value in read if value.is_initializer()],
        doc_string=graph.doc_string,
        opset_imports=dict(graph.opset_imports),
        name=f"{party}.{level}",
        metadata_props=dict(graph.metadata_props),
    )
    return StageCut(party=party, level=level, view=view)
