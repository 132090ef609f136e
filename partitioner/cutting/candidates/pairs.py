"""Find the pairs of tensors that divide a graph for a U-shaped cut.

In a U-shaped cut, the server has the nodes between the tensors of the *head* and of the *tail*.
Each path from the model's inputs to these nodes must pass through the head, and each path from
these nodes to the outputs through the tail.  A quick check of both conditions is made for all tails
of a head.  The pairs that pass are then checked exactly (:mod:`regions`).

This module uses graphs and names only; it does not depend on losses, gradients or runtimes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import NotACut, SharedParameter, TooManyTries
from splitonnx.partitioner.cutting.candidates.bottlenecks import PostDominators
from splitonnx.partitioner.cutting.candidates.regions import Regions
from splitonnx.partitioner.cutting.cuts import divide, find_opened, survey
from splitonnx.partitioner.graphs.traversals import find_dependents, list_inputs, walk_back

MOST_VISITS = 10_000_000
"""Limit of nodes visited to find the pairs of a graph."""
_DIVIDE = 4
"""How often a call of :func:`divide` counts each node of the graph as visited."""

Tensors = tuple[ir.Value, ...]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A legal U-shaped cut: the tensors at its two ends, and the server's nodes between them.

    ``at`` holds the tensors of the head, followed by the raw inputs that are sent with them.
    ``tail_at`` holds the tensors of the tail.
    """

    at: Tensors
    tail_at: Tensors
    server: frozenset[ir.Node]


class PairSearch:
    """A search for the pairs of tensors that divide one graph for a U-shaped cut.

    ``state`` names the graph inputs that are weights rather than data, and ``trainable`` the
    trained weights.  The raw inputs in ``sent`` may be sent together with the head.
    """

    def __init__(
        self,
        graph: ir.Graph,
        *,
        state: Collection[str],
        trainable: Collection[str],
        sent: Sequence[ir.Value] = (),
    ) -> None:
        self._graph, self._state, self._trainable = graph, state, trainable
        self._sent = tuple(sent)
        around = self._around = survey(graph, state=state, trainable=trainable)
        self._regions = Regions(graph, around, trainable)
        self._data = around.data - {value for node in around.sizes for value in node.outputs}
        self._nodes = [
            node
            for node in graph
            if node in self._regions.needed
            and node not in around.sizes
            and set(node.outputs) & self._data
        ]
        self._order = {node: place for place, node in enumerate(self._nodes)}
        self._reads = [[v for v in list_inputs(node) if v in self._data] for node in self._nodes]
        self._tree = PostDominators(self._nodes, self._data)
        self._places = {
            value: place
            for place, value in enumerate(value for node in self._nodes for value in node.outputs)
            if value in self._data
        }
        self._free = self._find_free(self._sent)
        self._visits = 0

    def find(self, at: Tensors | None = None, tail_at: Tensors | None = None) -> Iterator[Pair]:
        """Yield the legal pairs, in the graph's order of their heads, and then of their tails.

        ``at`` holds all tensors of the head, and ``tail_at`` all tensors of the tail.  If one of
        the two is not given, each tensor of the graph that can be at this end is tried alone.

        Raises:
            TooManyTries: checking the pairs would visit more than :data:`MOST_VISITS` nodes.
        """
        heads: list[Tensors] = [(value,) for value in self._places] if at is None else [at]
        for head in heads:
            for tail in self._list_tails(head) if tail_at is None else [tail_at]:
                pair = self.try_pair(self._add_sent(head, tail), tail)
                if pair is not None:
                    yield pair

    def try_pair(self, at: Tensors, tail_at: Tensors) -> Pair | None:
        """Return the pair with the server's nodes, or ``None`` if the pair is not a legal cut.

        Raises:
            TooManyTries: more than :data:`MOST_VISITS` nodes have been visited.
        """
        server: frozenset[ir.Node] | None = None
        region = self._regions.find(at, tail_at)
        self._count(len(region.nodes))
        if region.is_legal is None:
            self._count(_DIVIDE * len(self._graph))
            with suppress(NotACut, SharedParameter):
                server = divide(
                    self._graph,
                    at,
                    tail_at,
                    state=self._state,
                    trainable=self._trainable,
                    around=self._around,
                ).server
        elif region.is_legal:
            server = frozenset(region.nodes)
        return None if server is None else Pair(at=at, tail_at=tail_at, server=server)

    def _count(self, visits: int) -> None:
        self._visits += visits
        if self._visits > MOST_VISITS:
            raise TooManyTries(
                "the list of the model's pairs",
                f"more than {MOST_VISITS:,} visits of its {len(self._graph)} nodes would be needed",
                "name one end with --at or --tail-at",
            )

    def _add_sent(self, head: Tensors, tail: Tensors) -> Tensors:
        """Add the raw inputs in ``sent`` that the nodes between the two ends read."""
        if not self._sent:
            return head
        _, sources = walk_back(tail, {*head, *self._sent}, self._around.sizes)
        return (*head, *(v for v in self._sent if v in sources and v not in head))

    def _list_tails(self, head: Tensors) -> list[Tensors]:
        """List the single tensors that may be the tail of a head, in the graph's order.

        All nodes between the head and such a tensor depend on no other data, and the tensor is on
        all of their paths to the outputs.  Nodes that both parties may compute are ignored.
        """
        opened = self._find_opened(head)
        behind, after = self._find_behind(head)
        found = {value for value in opened if value in behind}
        for place in after:
            node = self._nodes[place]
            if any(value in head or value in opened for value in self._reads[place]) and any(
                value in behind and value not in opened for value in node.outputs
            ):
                found.update(self._climb(node, behind))
        found.difference_update(head)
        listed = sorted(found & self._places.keys(), key=self._places.__getitem__)
        return [(value,) for value in listed]

    def _climb(self, node: ir.Node, behind: set[ir.Value]) -> Iterator[ir.Value]:
        """Yield the tensors in ``behind`` through which all paths from a node pass."""
        for place in self._tree.climb(node):
            if isinstance(place, ir.Value):
                if place not in behind:
                    return
                yield place

    def _find_opened(self, head: Tensors) -> set[ir.Value]:
        """Find the tensors that can be computed without weights from raw inputs that are sent."""
        private = {*head, *self._sent} & self._around.private
        if not private:
            return private
        return find_opened(self._graph, private, self._around.data, self._trainable)

    def _find_free(self, sent: Sequence[ir.Value]) -> set[ir.Value]:
        """Find the data that depend on no raw inputs except those in ``sent``."""
        held = [value for value in self._around.raw if value not in sent]
        return self._data - find_dependents(self._graph, held)

    def _find_behind(self, head: Tensors) -> tuple[set[ir.Value], list[int]]:
        """Find the tensors that depend on a head, and on no data other than it and ``sent``.

        Return also the places of the nodes that compute them.
        """
        behind, after = set(head), list[int]()
        makers = [value.producer() for value in head]
        free = self._find_free((*self._sent, *head)) if None in makers else self._free
        first = min((self._order.get(m, 0) if m is not None else 0 for m in makers), default=0)
        self._count(len(self._nodes) - first)
        for place in range(first, len(self._nodes)):
            reads = self._reads[place]
            if any(v in behind for v in reads) and all(v in behind or v in free for v in reads):
                behind.update(v for v in self._nodes[place].outputs if v in self._data)
                after.append(place)
        return behind, after
