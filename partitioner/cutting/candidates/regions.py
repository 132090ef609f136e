"""Check whether the nodes between the two ends of a pair can be separated from the rest of a graph.

:func:`cuts.divide` defines what is legal, but walks through the entire graph.  Here only the nodes
between the ends are walked through: they must depend on no other data, and no other node may read
what they compute.  Where the answer depends on more than that, such as on sizes that the other
party would have to derive, it is left to :func:`cuts.divide`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.cutting.cuts import Surroundings
from splitonnx.partitioner.graphs.traversals import (
    find_dependents,
    list_inner,
    list_inputs,
    walk_back,
)

Tensors = tuple[ir.Value, ...]


@dataclass(frozen=True, kw_only=True)
class Region:
    """The nodes between the two ends of a pair.

    ``is_legal`` tells whether the pair is legal, or is ``None`` if :func:`cuts.divide` must decide.
    """

    nodes: set[ir.Node]
    is_legal: bool | None


class Regions:
    """The regions of one graph.

    ``needed`` holds the nodes on which the graph's outputs depend.
    """

    def __init__(self, graph: ir.Graph, around: Surroundings, trainable: Collection[str]) -> None:
        self._around = around
        self.needed, _ = walk_back(graph.outputs, ends=around.readers)
        self._outer = {part: node for node in self.needed for part in list_inner(node)}
        self._outputs = set(graph.outputs)
        self._read = {value for node in self.needed for value in list_inputs(node)}
        trained = [value for value in graph.inputs if value.name in trainable]
        self._trained = find_dependents(graph, trained)

    def find(self, at: Tensors, tail_at: Tensors) -> Region:
        """Find the nodes between two ends, and whether they can be separated from the others."""
        around = self._around
        nodes, sources = walk_back(tail_at, set(at), around.sizes)
        is_legal: bool | None = None
        if not any(value in around.private or value not in around.data for value in at):
            is_legal = self._check(nodes, sources, at, tail_at)
        return Region(nodes=nodes, is_legal=is_legal)

    def _check(
        self, nodes: set[ir.Node], sources: set[ir.Value], at: Tensors, tail_at: Tensors
    ) -> bool | None:
        around = self._around
        if not nodes or any(value in around.raw for value in sources) or set(tail_at) & sources:
            return None
        if not all(v in sources for v in at) or not all(
            v in around.data and (v in self._read or v in self._outputs) for v in tail_at
        ):
            return None
        for node in nodes:
            if node in around.sizes and not all(
                value in at or value.producer() in nodes for value in around.sizes[node]
            ):
                return None
        values = {v for n in nodes for v in (*n.outputs, *list_inputs(n))} - {*at, *tail_at}
        verdicts = [self._is_inside(value, nodes) for value in values]
        return None if None in verdicts else all(verdicts)

    def _is_inside(self, value: ir.Value, nodes: set[ir.Node]) -> bool | None:
        """Return whether no other node may use a value that nodes of a region compute or read.

        Values that do not depend on data or trained weights may be used everywhere.
        """
        around = self._around
        is_held = value in around.data or value in self._trained
        for use in value.uses():
            node = self._outer.get(use.node, use.node)
            if node in nodes or node not in self.needed:
                continue
            if node in around.sizes:
                return None
            if is_held:
                return False
        return not (is_held and value in self._outputs)
