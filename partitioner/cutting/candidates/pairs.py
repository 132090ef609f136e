"""Find the pairs of tensors that divide a graph for a U-shaped cut.

In such a cut the server has the nodes between a tensor of the *head* and a tensor of the *tail*.
Each path from the model's inputs to these nodes must pass through the head, and each path from
them to the outputs through the tail.  Both conditions are checked quickly for all tails of a head;
the pairs that pass are checked with :func:`cuts.divide`, which defines what is legal.

This module uses graphs and names only; it does not depend on losses, gradients or runtimes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import NotACut, SharedParameter, TooManyTries
from splitonnx.partitioner.cutting.candidates.bottlenecks import PostDominators
from splitonnx.partitioner.cutting.cuts import Partition, divide, find_opened, survey
from splitonnx.partitioner.graphs.traversals import list_inputs, walk_back

MOST_VISITS = 1_000_000
"""Limit of nodes visited to check all pairs of a graph; each check visits the entire graph."""

Tensors = tuple[ir.Value, ...]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two ends of a legal U-shaped cut, and the partition of the graph at them.

    ``at`` holds the tensors of the head, followed by the raw inputs that are sent with them.
    """

    at: Tensors
    tail_at: Tensors
    partition: Partition


class PairSearch:
    """A search for the pairs of one graph.

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
        self._around = survey(graph, state=state, trainable=trainable)
        needed, _ = walk_back(graph.outputs, ends=self._around.readers)
        sized = {value for node in self._around.sizes for value in node.outputs}
        self._data = self._around.data - sized
        self._nodes = [
            node
            for node in graph
            if node in needed and node not in self._around.sizes and set(node.outputs) & self._data
        ]
        self._reads = {
            node: [value for value in list_inputs(node) if value in self._data]
            for node in self._nodes
        }
        self._tree = PostDominators(self._nodes, self._data)
        self._places = {
            value: place
            for place, value in enumerate(value for node in self._nodes for value in node.outputs)
            if value in self._data
        }
        self._visits = 0

    def find(self, at: Tensors | None = None, tail_at: Tensors | None = None) -> Iterator[Pair]:
        """Yield the legal pairs, ordered by head and then by tail, as in the graph.

        ``at`` and ``tail_at`` are the tensors of one end, all of which are sent.  Where an end is
        not given, each single tensor is tried.

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
        """Divide the graph at a pair; return ``None`` if this is not legal."""
        self._visits += len(self._graph)
        if self._visits > MOST_VISITS:
            raise TooManyTries(
                "the list of the model's pairs",
                f"they would each have to be tried on all of its {len(self._graph)} nodes",
                "name one end with --at or --tail-at",
            )
        with suppress(NotACut, SharedParameter):
            partition = divide(
                self._graph,
                at,
                tail_at,
                state=self._state,
                trainable=self._trainable,
                around=self._around,
            )
            return Pair(at=at, tail_at=tail_at, partition=partition)
        return None

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
        behind, opened = self._find_behind(head)
        found = {value for value in opened if value in behind}
        for node in self._nodes:
            reads = self._reads[node]
            starts = any(v in head or v in opened for v in reads)
            if not starts or not any(v in behind and v not in opened for v in node.outputs):
                continue
            for place in self._tree.climb(node):
                if isinstance(place, ir.Value):
                    if place not in behind:
                        break
                    found.add(place)
        found.difference_update(head)
        listed = sorted(found & self._places.keys(), key=self._places.__getitem__)
        return [(value,) for value in listed]

    def _find_behind(self, head: Tensors) -> tuple[set[ir.Value], set[ir.Value]]:
        """Find the tensors that depend on a head, and on no data other than it and ``sent``.

        The second result is the tensors that can be computed from raw inputs that are sent.
        """
        sent = {*head, *self._sent}
        opened = find_opened(
            self._graph, sent & self._around.private, self._around.data, self._trainable
        )
        behind, leaking = set(head), {value for value in self._around.raw if value not in sent}
        for node in self._nodes:
            reads = self._reads[node]
            if any(value in leaking for value in reads):
                leaking.update(value for value in node.outputs if value not in head)
            elif any(value in behind for value in reads):
                behind.update(value for value in node.outputs if value in self._data)
        return behind, opened
