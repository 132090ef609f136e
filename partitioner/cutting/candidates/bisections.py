"""Find each single tensor at which a model can be legally cut.

Checking one tensor takes a walk through the graph, so checking each tensor separately would take
quadratic time.  However, the single tensors that are legal cuts usually form a chain in which each
tensor depends on the previous one.  From one tensor to the next, the client needs more nodes and
the server needs fewer.  It is therefore enough to keep one growing set of nodes per party: the
client's grows in one forward walk along the chain, and the server's in one backward walk.

:func:`cuts.divide` defines which cuts are legal.  Tensors that do not fit into the chain are
checked with that function, up to a limit.  If raw inputs (inputs that are data) may be sent
together with a tensor, the tensors that :mod:`bottlenecks` finds are also checked.

This module uses graphs and names only; it does not depend on losses, gradients or runtimes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import NotACut, SharedParameter, TooManyTries
from splitonnx.partitioner.cutting.candidates.bottlenecks import add_beside, list_candidates
from splitonnx.partitioner.cutting.cuts import (
    Partition,
    Surroundings,
    divide,
    list_server_outputs,
    survey,
)
from splitonnx.partitioner.cutting.sizes import SizeWatch, find_underived
from splitonnx.partitioner.graphs.traversals import (
    ResumedWalk,
    find_last_read,
    list_inputs,
    walk_back,
)
from splitonnx.partitioner.inference.dimensions import Amount, Dim

MOST_VISITS = 4_000_000
"""Limit of nodes visited by all calls of :func:`divide`; each call visits the entire graph."""


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """A legal cut at a single tensor.

    ``at`` holds the tensor, followed by the raw inputs that must be sent with it.  ``client`` is
    the number of elements of all trained parameters that the tensor depends on.  ``server`` is the
    number of elements of all trained parameters that the server reads.  ``trained`` is true if the
    tensor depends on a trained parameter.
    """

    at: tuple[ir.Value, ...]
    client: int
    server: int
    trained: bool


def find_bisections(
    graph: ir.Graph,
    *,
    state: Collection[str],
    trainable: Mapping[str, int],
    sent: Sequence[ir.Value] = (),
) -> list[Bisection]:
    """List the single tensors at which the graph can be legally cut, in the graph's order.

    ``state`` names the graph inputs that are weights rather than data.  ``trainable`` maps each
    trained weight to its number of elements.  The raw inputs in ``sent`` may be sent together with
    a tensor if the cut requires it.

    Raises:
        TooManyTries: checking tensors one by one would visit more than :data:`MOST_VISITS` nodes.
    """
    around = survey(graph, state=state, trainable=trainable)
    candidates = list_candidates(graph, around, sent, trainable)
    client = _Client(around, trainable)
    row = [value for value in candidates if client.advance(value)]
    server = _Server(graph, around, trainable, client, row)
    classified = {row[place]: server.classify(place) for place in reversed(range(len(row)))}
    visits, found = 0, []
    for value in add_beside(graph, candidates, around, sent, trainable):
        made = classified.get(value)
        if made is None or (made is _REFUSED and sent):
            visits += len(graph)
            if visits > MOST_VISITS:
                raise TooManyTries(
                    "the list of the model's cuts",
                    f"its tensors would each have to be tried on all of its {len(graph)} nodes",
                    "cut at a tensor by its name",
                )
            made = _try(graph, value, sent, state, trainable, around)
        if made is not _REFUSED:
            found.append(made)
    return found


def _try(
    graph: ir.Graph,
    value: ir.Value,
    sent: Sequence[ir.Value],
    state: Collection[str],
    trainable: Mapping[str, int],
    around: Surroundings,
) -> Bisection:
    """Cut at one tensor and the inputs in ``sent`` that it requires, or return ``_REFUSED``."""
    with suppress(NotACut, SharedParameter):
        partition = _divide_at(graph, value, sent, state, trainable, around)
        before = {source.name for source in walk_back([value])[1]} & set(trainable)
        read = {v.name for node in partition.server for v in list_inputs(node)}
        return Bisection(
            at=partition.at,
            client=sum(trainable[name] for name in before if name),
            server=sum(elements for name, elements in trainable.items() if name in read),
            trained=bool(before),
        )
    return _REFUSED


_REFUSED = Bisection(at=(), client=0, server=0, trained=False)
"""Placeholder for a tensor that does not divide the graph."""


def _divide_at(
    graph: ir.Graph,
    only: ir.Value,
    sent: Sequence[ir.Value],
    state: Collection[str],
    trainable: Collection[str],
    around: Surroundings,
) -> Partition:
    try:
        return divide(graph, [only], state=state, trainable=trainable, around=around)
    except NotACut as reason:
        missing = [value for value in sent if value.name in reason.raw]
        read = _list_read(graph, only, sent, around)
        if not missing and not read:
            raise
    if missing and missing != read:
        with suppress(NotACut, SharedParameter):
            at = [only, *missing]
            return divide(graph, at, state=state, trainable=trainable, around=around)
    return divide(graph, [only, *read], state=state, trainable=trainable, around=around)


def _list_read(
    graph: ir.Graph, only: ir.Value, sent: Sequence[ir.Value], around: Surroundings
) -> list[ir.Value]:
    """List the inputs in ``sent`` that the server would read if all of them were sent."""
    ends = list_server_outputs(graph, [only], around)
    _, sources = walk_back(ends, {only, *sent}, around.sizes)
    return [value for value in sent if value in sources]


class _Client:
    """The nodes and weights that the client needs for a cut at each tensor of the chain."""

    def __init__(self, around: Surroundings, trainable: Mapping[str, int]) -> None:
        self._around, self._trainable = around, trainable
        self._all, self._head = ResumedWalk(), ResumedWalk(ends=around.sizes)
        self._beyond = ResumedWalk(ends=around.readers)
        self._watch = SizeWatch(around.sizes)
        self._underived: set[ir.Node] = set()
        self._parameters: set[str] = set()
        self._last: ir.Node | None = None
        self._total = 0
        self._held = list(around.raw)
        self.entered: dict[ir.Node, int] = {}
        """Map each node to the position in the chain from which on the client needs the node."""
        self.first_read: dict[str, int] = {}
        """Map each trained parameter to the position from which on the client reads it."""
        self.elements: list[int] = []
        self.trained: list[bool] = []
        self.regular: list[bool] = []

    def advance(self, value: ir.Value) -> bool:
        """Append a tensor if it depends on the chain's last tensor; return whether it does."""
        every, sources, met = self._all.explore([value], {})
        new, _, met_head = self._head.explore([value], {})
        if self._last is not None and not (self._last in met and self._last in met_head):
            return False
        self._all.nodes.update(every)
        self._head.nodes.update(new)
        self._last = value.producer()
        self._note(new)
        names = {v.name or "" for v in sources if v.name in self._trainable} - self._parameters
        self._parameters |= names
        self._total += sum(self._trainable[name] for name in names)
        self.elements.append(self._total)
        self.trained.append(bool(self._parameters))
        self.regular.append(not self._underived)
        return True

    def _note(self, new: Sequence[ir.Node]) -> None:
        place, around = len(self.elements), self._around
        self.entered.update((node, place) for node in new)
        away, near = self._watch.enter(new, self._head.nodes, around.raw)
        known = around.known
        self._underived |= {n for n in away if find_underived(n, self._held, known) is not None}
        self._underived.difference_update(near)
        more, _, _ = self._beyond.explore([v for node in near for v in node.outputs], {})
        self._beyond.nodes.update(more)
        for node in (*new, *more):
            for value in list_inputs(node):
                if value.name in self._trainable:
                    self.first_read.setdefault(value.name or "", place)


_Sizes = tuple[Amount, ...] | None
"""The unknown sizes that a node computes; ``None`` if their number is not known."""


class _Server:
    """The nodes and weights that the server needs for a cut at each tensor of the chain.

    The chain is walked from its end to its start.
    """

    def __init__(
        self,
        graph: ir.Graph,
        around: Surroundings,
        trainable: Mapping[str, int],
        client: _Client,
        row: Sequence[ir.Value],
    ) -> None:
        self._around, self._trainable, self._client, self._row = around, trainable, client, row
        self._places = {value: place for place, value in enumerate(row)}
        self._walk, self._beyond = ResumedWalk(ends=around.sizes), ResumedWalk(ends=around.readers)
        self._watch = SizeWatch(around.sizes)
        self._away: defaultdict[_Sizes, dict[ir.Node, None]] = defaultdict(dict)
        self._wanted: dict[ir.Node, _Sizes] = {}
        self._derived: dict[tuple[_Sizes, _Sizes], bool] = {}
        self._ends: defaultdict[int, list[ir.Value]] = defaultdict(list)
        last = find_last_read(around.passing, row)  # beyond it, the client computes the output
        for value in graph.outputs:
            maker = value.producer()
            entered = client.entered.get(maker, len(row)) if maker is not None else len(row)
            self._ends[min(entered - 1, last.get(value, entered - 1))].append(value)
        self._reached: set[int] = set()
        self._leaks, self._computes = False, False
        self._shared, self._until = 0, Counter[int]()
        self._read: set[str] = set()
        self._elements = 0

    def classify(self, place: int) -> Bisection | None:
        """Check the cut at position ``place`` of the chain.

        Return ``_REFUSED`` if the cut is not legal, and ``None`` if this walk cannot decide.  Call
        this method once for every position, from the last one to the first.
        """
        self._shared -= self._until.pop(place + 1, 0)
        targets = self._ends.pop(place, [])
        if place + 1 in self._reached:
            self._reached.remove(place + 1)
            targets.append(self._row[place + 1])
        self._grow(targets, place)
        earlier = len(self._reached) - (place in self._reached)
        if self._leaks or earlier or self._shared:
            return _REFUSED
        held = self._row[place]
        kept = [self._classify_size(node, place) for node in self._list_underived(held)]
        if False in kept:
            return _REFUSED
        if None in kept or not self._client.regular[place]:
            return None
        if place not in self._reached or not self._computes:
            return _REFUSED
        return Bisection(
            at=(held,),
            client=self._client.elements[place],
            server=self._elements,
            trained=self._client.trained[place],
        )

    def _grow(self, targets: Sequence[ir.Value], place: int) -> None:
        around = self._around
        new, reached, _ = self._walk.explore(targets, self._places, place)
        self._walk.nodes.update(new)
        for value in reached:
            if value in self._places:
                self._reached.add(self._places[value])
            elif value in around.raw:
                self._leaks = True
        away, near = self._watch.enter(new, self._walk.nodes, ())
        for node in away:
            self._wanted[node] = _list_sizes(node, around)
            self._away[self._wanted[node]][node] = None
        for node in near:
            if node in self._wanted:
                wanted = self._wanted.pop(node)
                del self._away[wanted][node]
                if not self._away[wanted]:
                    del self._away[wanted]
        more, _, _ = self._beyond.explore([v for node in near for v in node.outputs], {})
        self._beyond.nodes.update(more)
        for node in new:
            if set(node.outputs) & around.data:
                self._computes |= bool(node.inputs)
                self._share(self._client.entered.get(node), place)
        for node in (*new, *more):
            for value in list_inputs(node):
                if value.name in self._trainable and value.name not in self._read:
                    self._read.add(value.name or "")
                    self._elements += self._trainable[value.name or ""]
                    self._share(self._client.first_read.get(value.name or ""), place)

    def _share(self, since: int | None, place: int) -> None:
        """Record that both parties need a node or weight for cuts from ``since`` to ``place``."""
        if since is not None and since <= place:
            self._shared += 1
            self._until[since] += 1

    def _list_underived(self, held: ir.Value) -> list[ir.Node]:
        """List the nodes that compute sizes which the server can neither compute nor read."""
        own = tuple(d for d in self._around.known.shape(held) or () if isinstance(d, Dim))
        found: list[ir.Node] = []
        for wanted, nodes in self._away.items():
            if (wanted, own) not in self._derived:
                missing = find_underived(next(iter(nodes)), [held], self._around.known)
                self._derived[wanted, own] = wanted is not None and missing is None
            if not self._derived[wanted, own]:
                found += nodes
        return found

    def _classify_size(self, node: ir.Node, place: int) -> bool | None:
        """Return whether the sizes that a node computes can be read from the cut tensor alone.

        If not, the cut is not legal.  Return ``None`` if the server might compute the tensors that
        have these sizes.
        """
        makers = [v.producer() for v in self._around.sizes[node] if v is not self._row[place]]
        away = [maker for maker in makers if maker not in self._walk.nodes]
        before = self._client.entered
        if any(maker is None or before.get(maker, place + 1) <= place for maker in away):
            return False
        return None if away else True


def _list_sizes(node: ir.Node, around: Surroundings) -> _Sizes:
    content = around.known.content(node.outputs[0])
    if content is None:
        return None
    return tuple(dict.fromkeys(d for d in content.reshape(-1) if isinstance(d, Dim)))
