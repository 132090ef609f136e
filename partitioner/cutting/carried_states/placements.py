"""Find the party that keeps each state: the one that reads it and computes what replaces it.

A state never crosses the cut.  The nodes that compute the output may be needed by nothing else, so
they may belong to neither party yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from splitonnx.errors import NotACut
from splitonnx.names import CLIENT, SERVER, name_carried
from splitonnx.partitioner.cutting.cuts import Partition
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.graphs.traversals import (
    find_dependents,
    list_inputs,
    map_values,
    walk_back,
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A partition in which one party has all nodes of each state.

    ``commits`` maps the input of each state to the value that replaces it, and ``owners`` to the
    party that keeps it.
    """

    partition: Partition
    commits: Mapping[str, str] = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)


def leave_out_states(prepared: PreparedModel, outputs: Collection[str]) -> PreparedModel:
    """Return a model that does not predict the outputs of its states, except those in ``outputs``.

    A model with no other output keeps them.
    """
    names = {output for output, _ in prepared.states}.difference(outputs)
    graph = prepared.inference.graph
    kept = [value.name for value in graph.outputs if value.name not in names]
    if not names or not kept:
        return prepared
    trimmed = copy_model(prepared.inference)
    trimmed.graph.outputs[:] = [v for v in trimmed.graph.outputs if v.name in kept]
    return replace(prepared, inference=trimmed)


def place_states(prepared: PreparedModel, graph: ir.Graph, partition: Partition) -> Placement:
    """Find the party of each state, and add a node to ``graph`` for the value that replaces it.

    ``graph`` is a copy of the training form whose outputs are those that the losses read.  What
    only the states need is added to a party in the returned partition.

    Raises:
        NotACut: both parties read a state, or one reads it and the other computes its output.
    """
    if not prepared.states:
        return Placement(partition=partition)
    search = _Search(prepared, graph, partition)
    owners = search.choose_owners()
    nodes: dict[str, set[ir.Node]] = {SERVER: set(partition.server), CLIENT: set(partition.client)}
    commits = {}
    for output, source in prepared.states:
        party = owners[source]
        node = _add_node(graph, search.values[output], search.values[source])
        commits[source] = node.outputs[0].name or ""
        nodes[party] |= {node, *(search.find_nodes(output, party) or ())}
    if partition.at:
        server, client = frozenset(nodes[SERVER]), frozenset(nodes[CLIENT])
        partition = replace(partition, server=server, client=client)
    return Placement(partition=partition, commits=commits, owners=owners)


def check_readers(
    prepared: PreparedModel,
    at: Sequence[str],
    training: Mapping[str, frozenset[str]],
    predict: Mapping[str, frozenset[str]],
) -> None:
    """Check that only the party that keeps a state reads it, in training and in prediction.

    ``training`` and ``predict`` map weights and states to the parties that read them.

    Raises:
        NotACut: another party reads a state.
    """
    for output, source in prepared.states:
        if len(training[source] | predict.get(source, frozenset())) > 1:
            raise _refuse(at, _explain_both(output, source))


def _explain_both(output: str, source: str) -> str:
    return (
        f"both parties read the state '{source}' (--state {output}={source}), which one of them "
        "keeps; cut where one party has every node that reads it"
    )


def _refuse(at: Sequence[str], reason: str) -> NotACut:
    return NotACut(list(at), reason=reason)


def _add_node(graph: ir.Graph, value: ir.Value, source: ir.Value) -> ir.Node:
    """Add a node for the value that replaces a state, in the state's type."""
    name = name_carried(source.name or "")
    assert source.dtype is not None
    if value.dtype == source.dtype:
        node = ir.node("Identity", [value], name=name)
    else:  # the state of a model that is trained in float32 keeps its own type
        node = ir.node("Cast", [value], {"to": source.dtype.value}, name=name)
    made = node.outputs[0]
    made.name, made.type, made.shape = name, source.type, source.shape
    graph.append(node)
    return node


class _Search:
    """What each party reads and computes of the states of one partition."""

    def __init__(self, prepared: PreparedModel, graph: ir.Graph, partition: Partition) -> None:
        self.values = map_values(graph)
        self._pairs = prepared.states
        self._partition = partition
        self._needed = walk_back(graph.outputs)[0]
        self._states = {source: self.values[source] for _, source in prepared.states}
        self._trained = {self.values[n] for n in prepared.trainable if n in self.values}
        self._raw = {value for value in graph.inputs if value.name not in prepared.state}
        roots = {*self._raw, *self._trained, *self._states.values()}
        self._moving = find_dependents(graph, roots)

    def choose_owners(self) -> dict[str, str]:
        """Map the input of each state to the party that keeps it.

        Raises:
            NotACut: as raised by :func:`place_states`.
        """
        owners: dict[str, str] = {}
        for output, source in self._pairs:
            readers = self._find_readers(source)
            if len(readers) > 1:
                raise self._refuse(_explain_both(output, source))
            owners.update(dict.fromkeys([source], *readers) if readers else {})
        for output, source in self._pairs:
            if source not in owners:  # nothing but its own output reads it
                owners[source] = self._choose(output, owners)
        for output, source in self._pairs:
            if not self._is_possible(output, owners[source], owners):
                raise self._refuse(self._explain_away(output, source, owners[source]))
        return owners

    def find_nodes(self, output: str, party: str) -> set[ir.Node] | None:
        """Return the nodes from which a party can compute an output, or ``None`` if it cannot."""
        partition = self._partition
        if not partition.at:
            return walk_back([self.values[output]])[0]
        is_server = party == SERVER
        nodes, sources = walk_back(
            [self.values[output]], set(partition.at if is_server else partition.tail_at)
        )
        own = partition.server if is_server else partition.client
        others = (partition.client if is_server else partition.server) - own
        if any(node in others and self._moving.intersection(node.outputs) for node in nodes):
            return None
        read = {value for node in others for value in list_inputs(node)}
        if sources & self._trained & read:
            return None
        if is_server and sources.intersection(self._raw).difference(partition.at):
            return None
        return nodes

    def _find_readers(self, source: str) -> set[str]:
        """Return the parties with nodes that read a state for the losses."""
        partition, value = self._partition, self.values[source]
        nodes = [node for node in self._needed if value in list_inputs(node)]
        if not partition.at:
            return {CLIENT} if nodes else set()
        return {
            party
            for party, own in ((SERVER, partition.server), (CLIENT, partition.client))
            if any(node in own for node in nodes)
        }

    def _choose(self, output: str, owners: Mapping[str, str]) -> str:
        """Choose the party of a state that the losses do not depend on."""
        for party in (CLIENT, SERVER):
            if self._is_possible(output, party, owners):
                return party
        return CLIENT

    def _is_possible(self, output: str, party: str, owners: Mapping[str, str]) -> bool:
        nodes = self.find_nodes(output, party)
        if nodes is None:
            return False
        return all(owners.get(name, party) == party for name in self._list_states(nodes))

    def _list_states(self, nodes: Collection[ir.Node]) -> Iterator[str]:
        read = {value for node in nodes for value in list_inputs(node)}
        return (name for name, value in self._states.items() if value in read)

    def _explain_away(self, output: str, source: str, party: str) -> str:
        return (
            f"the {party} reads the state '{source}' (--state {output}={source}), but does not "
            f"compute '{output}', which replaces it, and a state does not cross; cut where one "
            "party does both"
        )

    def _refuse(self, reason: str) -> NotACut:
        return _refuse([value.name or "" for value in self._partition.at], reason)
