"""Check whether the nodes between the two ends of a pair can be separated from the rest of a graph.

:func:`cuts.divide` defines what is legal, but walks through the entire graph.  This module
visits only the nodes between the ends: they must not depend on other data, and no other node may
read what they compute, except for the tensors of the tail.  If the answer depends on more than
that, such as on sizes that the other party would have to derive, :func:`cuts.divide` must decide.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.cutting.cuts import Surroundings, find_opened
from splitonnx.partitioner.graphs.traversals import (
    find_data,
    list_inner,
    list_inputs,
    walk_back,
)

Tensors = tuple[ir.Value, ...]


@dataclass(frozen=True, kw_only=True)
class Region:
    """The nodes between the two ends of a pair.

    ``is_legal`` is true if the pair is legal, and ``None`` if :func:`cuts.divide` must decide.
    """

    nodes: set[ir.Node]
    is_legal: bool | None


class Regions:
    """A search for the nodes between the two ends of a pair, for any pairs of one graph.

    ``needed`` holds the nodes on which the graph's outputs depend.
    """

    def __init__(self, graph: ir.Graph, around: Surroundings, trainable: Collection[str]) -> None:
        self._graph, self._around, self._trainable = graph, around, trainable
        self._opened: dict[frozenset[ir.Value], set[ir.Value]] = {frozenset(): set()}
        """The result for the last head; pairs of the same head are checked one after the other."""
        self.needed, _ = walk_back(graph.outputs, ends=around.readers)
        self._outer = {part: node for node in self.needed for part in list_inner(node)}
        self._outputs = set(graph.outputs)
        self._read = {
            value for node in self.needed if node not in around.sizes for value in list_inputs(node)
        }
        trained = [value for value in graph.inputs if value.name in trainable]
        self._trained = find_data(graph, trained)

    def find(self, at: Tensors, tail_at: Tensors) -> Region:
        """Return the nodes between two ends, and whether they can be separated from the others."""
        nodes, sources = walk_back(tail_at, set(at), self._around.sizes)
        return Region(nodes=nodes, is_legal=self._check(nodes, sources, at, tail_at))

    def _check(
        self, nodes: set[ir.Node], sources: set[ir.Value], at: Tensors, tail_at: Tensors
    ) -> bool | None:
        around, opened = self._around, self._find_opened(at)
        if not nodes or any(v in around.raw and v not in at for v in sources):
            return None
        if not all(v in sources and v in around.data for v in at) or not all(
            v in around.data and (v in self._read or v in self._outputs) for v in tail_at
        ):
            return None
        if any(v in sources or v in opened for v in tail_at):
            return None
        for node in nodes:
            if node in around.sizes and not all(
                value in at or value.producer() in nodes for value in around.sizes[node]
            ):
                return None
        values = {v for n in nodes for v in (*n.outputs, *list_inputs(n))} - {*at, *tail_at}
        verdicts = [self._is_inside(value, nodes, opened) for value in values]
        return None if None in verdicts else all(verdicts)

    def _find_opened(self, at: Tensors) -> set[ir.Value]:
        """Find the tensors that can be computed without weights from raw inputs that are sent."""
        around = self._around
        private = frozenset(value for value in at if value in around.private)
        if private not in self._opened:
            self._opened = {
                private: find_opened(self._graph, private, around.data, self._trainable)
            }
        return self._opened[private]

    def _is_inside(
        self, value: ir.Value, nodes: set[ir.Node], opened: set[ir.Value]
    ) -> bool | None:
        """Return whether no node outside a region uses a value that the region computes or reads.

        Values that both parties can compute themselves may be used everywhere: those that depend on
        neither data nor trained weights, and those in ``opened``.
        """
        around = self._around
        is_held = value not in opened if value in around.data else value in self._trained
        for use in value.uses():
            node = self._outer.get(use.node, use.node)
            if node in nodes or node not in self.needed:
                continue
            if node in around.sizes:
                return None
            if is_held:
                return False
        return not (is_held and value in self._outputs)
