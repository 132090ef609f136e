"""Find candidate cut tensors: those at which a graph may be cut if some inputs are sent as well.

A tensor is a candidate if every path from its sources (the values from which it is computed) to the
graph's outputs passes through it.  Paths through the graph inputs that may be sent are ignored.
All candidates are found in one walk over the post-dominator tree (Cooper, Harvey and Kennedy, "A
Simple, Fast Dominance Algorithm"), in which the parent of a node or value is the nearest node or
value that is on all of its paths to the outputs.  Outputs that the client computes itself
(``Surroundings.passing``) do not count.  Because this module ignores weights and sizes,
:mod:`bisections` checks each candidate again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from splitonnx.partitioner.cutting.cuts import Surroundings, find_opened
from splitonnx.partitioner.graphs.traversals import list_inputs, reads_size, walk_back

Place = ir.Node | ir.Value


def find_bottlenecks(
    nodes: Sequence[ir.Node],
    data: Collection[ir.Value],
    free: Collection[ir.Value],
) -> list[ir.Value]:
    """List the tensors through which every path from their sources to the graph's outputs passes.

    A tensor's sources are the values from which it is computed.  Paths through the tensors in
    ``free`` are ignored.  Only the nodes in ``nodes``, which are in the graph's order, and the
    tensors in ``data`` are considered.
    """
    tree = PostDominators(nodes, data)
    excess = [0] * len(tree.parents)
    for place in tree.order:
        if not _is_free(place, free):
            number = tree.numbers[place]
            for after in tree.after(place):
                excess[after] += 1  # these paths miss all places before the paths meet
                excess[tree.parents[number]] -= 1
    for number in reversed(range(1, len(excess))):
        excess[tree.parents[number]] += excess[number]
    made = [value for node in nodes for value in node.outputs if value in tree.numbers]
    return [value for value in made if excess[tree.numbers[value]] == 0]


def _is_free(place: Place, free: Collection[ir.Value]) -> bool:
    values = place.outputs if isinstance(place, ir.Node) else [place]
    return all(value in free for value in values)


class PostDominators:
    """The tree of post-dominators of a graph's nodes and values.

    The parent of a node or value is the nearest node or value through which all paths from it to
    the graph's outputs pass.  Nodes and values are numbered from the outputs backwards; number 0,
    the root, represents the outputs.  ``order`` lists the nodes and values from number 1 on, and
    ``numbers`` maps each to its number.  ``parents[number]`` is the number of the parent.
    """

    def __init__(self, nodes: Sequence[ir.Node], data: Collection[ir.Value]) -> None:
        self._readers: dict[ir.Value, list[ir.Node]] = {}
        for node in nodes:
            for value in dict.fromkeys(list_inputs(node)):
                if value in data:
                    self._readers.setdefault(value, []).append(node)
        self._data = data
        self.order = [*_list_backwards(nodes, self._readers, data)]
        self.numbers = {place: number for number, place in enumerate(self.order, 1)}
        self.parents, self._depths = [0], [0]
        for place in self.order:
            meeting: int | None = None
            for after in self.after(place):
                meeting = after if meeting is None else self._meet(meeting, after)
            self.parents.append(meeting or 0)
            self._depths.append(self._depths[meeting or 0] + 1)

    def after(self, place: Place) -> list[int]:
        """List the numbers of the direct successors of a node or value.

        The successors of a node are its outputs, and those of a value are the nodes that read it.
        """
        if isinstance(place, ir.Node):
            return [self.numbers[value] for value in place.outputs if value in self.numbers]
        return [self.numbers[node] for node in self._readers.get(place, [])] or [0]

    def climb(self, place: Place) -> Iterator[Place]:
        """Yield the nodes and values that are on all paths from ``place`` to the outputs.

        The nearest comes first.  ``place``, which is a node or value itself, is left out.
        """
        number = self.parents[self.numbers[place]]
        while number:
            yield self.order[number - 1]
            number = self.parents[number]

    def _meet(self, one: int, other: int) -> int:
        while one != other:
            if self._depths[one] < self._depths[other]:
                one, other = other, one
            one = self.parents[one]
        return one


def _list_backwards(
    nodes: Sequence[ir.Node],
    readers: Collection[ir.Value],
    data: Collection[ir.Value],
) -> Iterator[Place]:
    """Yield nodes and values so that each comes after everything that depends on it."""
    made = set[ir.Value]()
    for node in reversed(nodes):
        outputs = [v for v in node.outputs if v in data and (v in readers or v.is_graph_output())]
        made.update(node.outputs)
        if outputs:
            yield from outputs
            yield node
    yield from (value for value in readers if value not in made)


def list_candidates(
    graph: ir.Graph,
    around: Surroundings,
    sent: Sequence[ir.Value],
    trainable: Collection[str],
) -> list[ir.Value]:
    """List the tensors at which a single-tensor cut may be possible, according to a quick test.

    A tensor passes the test if, just after it is computed, no other tensor that depends on data is
    needed later.  Every legal single-tensor cut passes, whatever the topological order.
    """
    lone = around.data - find_opened(graph, sent, around.data, trainable)
    ends = _list_served(graph, around)
    needed, _ = walk_back(ends, ends={node for node in graph if reads_size(node)})
    order = [node for node in graph if node in needed and set(node.outputs) & lone]
    waiting: dict[ir.Value, set[ir.Node]] = {value: set() for value in lone}
    for node in order:
        for value in list_inputs(node):
            if value in lone:
                waiting[value].add(node)
    alive = {value for value in around.raw if value in lone and waiting[value]}
    found = []
    for node in order:
        for value in list_inputs(node):
            if value in waiting:
                waiting[value].discard(node)
                if not waiting[value]:
                    alive.discard(value)
        alive.update(value for value in node.outputs if value in lone and waiting[value])
        if len(alive) == 1 and (only := next(iter(alive))) in node.outputs:
            found.append(only)
    return found


def _list_served(graph: ir.Graph, around: Surroundings) -> tuple[ir.Value, ...]:
    return tuple(value for value in graph.outputs if value not in around.passing)


def add_beside(
    graph: ir.Graph,
    candidates: list[ir.Value],
    around: Surroundings,
    sent: Sequence[ir.Value],
    trainable: Collection[str],
) -> list[ir.Value]:
    """Add the tensors that may divide the graph if the inputs in ``sent`` are sent too.

    At such a tensor, values that the server computes from these inputs may still be needed.
    """
    if not sent:
        return candidates
    data = around.data - {value for node in around.sizes for value in node.outputs}
    made = [n for n in graph if n not in around.sizes and set(n.outputs) & data]
    free = find_opened(graph, sent, around.data, trainable)
    chosen = set(candidates)
    for ends in dict.fromkeys([tuple(graph.outputs), _list_served(graph, around)]):
        needed, _ = walk_back(ends, ends=around.readers)
        chosen.update(find_bottlenecks([n for n in made if n in needed], data, free))
    return [value for node in graph for value in node.outputs if value in chosen]
