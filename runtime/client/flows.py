"""Analyze a party's stage graphs to find the data on which each sent tensor depends.

The stages of a phase are analyzed as one graph: a value that one stage outputs can be read by a
later stage under the same name.  Each output of a node is assumed to depend on all inputs of the
node; the outputs of Shape and Size are assumed to depend only on the sizes of the inputs.  A state
that the model hands itself depends on what replaces it in the step before.  What
counts as a layer of weights is in :mod:`splitonnx.layers`, as for ``cut``.  The analysis may
therefore report a dependence that does not exist, but it never misses one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

from splitonnx.bundles import PartyBundle
from splitonnx.layers import LayerNode, Mixing, may_mix
from splitonnx.manifests import Phase, Role, Source, Stage
from splitonnx.names import PREDICT, TRAIN, name_carried
from splitonnx.runtime.gate.readings import GraphNode, read_nodes

Value = tuple[str, str]
"""A value in a phase: its origin (a source, or the stage that computes it) and its name."""
_SIZES = frozenset({"Shape", "Size"})


class Extent(IntEnum):
    """How a value depends on an array: not at all, only on its sizes, or on its elements."""

    NOTHING = 0
    SIZES = 1
    VALUES = 2


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer: the name of its node, its operator and the names of the weights that it reads."""

    node: str
    operator: str
    weights: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operator} '{self.node}' ({', '.join(self.weights)})"


@dataclass(frozen=True, kw_only=True)
class Dependence:
    """How a tensor that a party sends depends on an array of the party's data.

    ``layers`` are the first layers on each path from the array to the tensor.  ``is_bare`` means
    that there is a path without a layer.  Both ignore paths that pass on only the sizes of the
    array.
    """

    extent: Extent
    is_bare: bool
    layers: tuple[Layer, ...]

    @property
    def tells_values(self) -> bool:
        """Return whether the array's elements reach the tensor on a path without a layer."""
        return self.is_bare and self.extent is Extent.VALUES


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A node within a phase, with the values that it reads and the values that it computes."""

    node: GraphNode
    reads: tuple[Value, ...]
    makes: tuple[Value, ...]
    arguments: tuple[Value, ...]


class Flow:
    """The stages of one phase of a party, analyzed as one graph."""

    def __init__(self, party: PartyBundle, phase: Phase) -> None:
        self._steps = [
            step for stage in phase.stages for step in _list_steps(stage, party.graphs[stage.graph])
        ]
        self._weights: dict[Value, tuple[str, ...]] = {
            (Source.STATE.value, spec.tensor.name): (spec.tensor.name,)
            for spec in party.manifest.state
            if spec.role is not Role.OPTIMIZER and spec.tensor.name not in _list_carried(party)
        }
        self._carried = {
            (Source.STASH.value, made): (Source.STATE.value, name)
            for name, made in phase.commits.items()
            if name in _list_carried(party)
        }
        self._held = {(Source.STATE.value, name) for name in _list_carried(party)}
        self._find_derived_weights()
        forward = next((own for own in party.manifest.phases if own.name == PREDICT), phase)
        self._mixing = Mixing(_list_layers(party, forward), party.weights.get)

    def find_dependence(
        self, array: str, sent: str, *, is_labels: bool = False
    ) -> Dependence | None:
        """Return how the tensor ``sent`` depends on ``array``, or ``None`` if it does not.

        ``is_labels`` means that ``array`` holds the labels, of which only gradients tell.
        """
        keeps = self._mixing.keeps_gradients if is_labels else self._mixing.keeps_values
        start, end = (Source.DATA.value, array), (Source.STASH.value, sent)
        reached = self._reach([start], lambda step: True)
        if end not in reached:
            return None
        bare = self._reach([start], lambda step: not self._is_layer(step, keeps))
        whole = {value for value, extent in bare.items() if extent is Extent.VALUES}
        before = self._walk_back(end)
        layers = [
            Layer(
                node=step.node.name,
                operator=step.node.operator,
                weights=self._list_weights(step),
            )
            for index, step in enumerate(self._steps)
            if index in before and self._is_layer(step, keeps) and whole & set(step.reads)
        ]
        return Dependence(extent=reached[end], is_bare=end in whole, layers=tuple(layers))

    def count_dependent(self, array: str, values: Iterable[str]) -> int:
        """Return how many of the stage outputs named in ``values`` depend on ``array``."""
        reached = self._reach([(Source.DATA.value, array)], lambda step: True)
        return sum((Source.STASH.value, name) in reached for name in values)

    def _is_layer(self, step: _Step, keeps: Callable[[str], bool]) -> bool:
        """Return whether a node mixes numbers by weights, or repositions them by rows of a table.

        ``keeps`` tells of a weight whether its layers only pass on numbers of the data.
        """
        if all(value in self._weights for value in step.makes):
            return False  # a weight's own preparation is not a layer
        read = [self._weights.get(value, ()) for value in step.arguments]
        positions = [position for position, names in enumerate(read) if names]
        if not may_mix(step.node.operator, positions):
            return False
        mixing = [position for position in positions if not all(map(keeps, read[position]))]
        return may_mix(step.node.operator, mixing)

    def _list_weights(self, step: _Step) -> tuple[str, ...]:
        """List the weights that a node reads."""
        found = [name for value in step.reads for name in self._weights.get(value, ())]
        return tuple(dict.fromkeys(found))

    def _find_derived_weights(self) -> None:
        """Record values that are computed only from weights, such as a transposed weight."""
        sources = {
            value
            for step in self._steps
            for value in step.reads
            if value[0] in (Source.DATA.value, Source.WIRE.value)
        } | self._held
        moving = self._reach(sources, lambda step: True)
        for step in self._steps:
            names = [name for value in step.reads for name in self._weights.get(value, ())]
            if names and not any(value in moving for value in step.reads):
                self._weights |= {value: tuple(dict.fromkeys(names)) for value in step.makes}

    def _reach(
        self, starts: Collection[Value], passes: Callable[[_Step], bool]
    ) -> Mapping[Value, Extent]:
        """Find the values that depend on ``starts`` through nodes that ``passes`` accepts."""
        reached = dict.fromkeys(starts, Extent.VALUES)
        before = -1
        while before != sum(reached.values()):  # stages may be listed in any order
            before = sum(reached.values())
            for step in self._steps:
                extent = max((reached.get(v, Extent.NOTHING) for v in step.reads), default=0)
                if extent and passes(step):
                    if step.node.operator in _SIZES:
                        extent = Extent.SIZES
                    for value in step.makes:
                        reached[value] = Extent(max(extent, reached.get(value, 0)))
            for made, kept in self._carried.items():  # the next step reads it
                if made in reached:
                    reached[kept] = Extent(max(reached[made], reached.get(kept, 0)))
        return reached

    def _walk_back(self, end: Value) -> set[int]:
        """Find the indices of the nodes on which a value depends."""
        makers = {value: index for index, step in enumerate(self._steps) for value in step.makes}
        found: set[int] = set()
        pending = [end]
        while pending:
            index = makers.get(pending.pop())
            if index is not None and index not in found:
                found.add(index)
                pending += self._steps[index].reads
        return found


def _list_carried(party: PartyBundle) -> set[str]:
    """Return the names of the states that a model hands itself, which depend on earlier data."""
    commits = party.manifest.phase(TRAIN).commits
    return {name for name, made in commits.items() if made == name_carried(name)}


def _list_layers(party: PartyBundle, phase: Phase) -> Iterator[LayerNode]:
    """Yield the nodes of a phase, whose names are those of weights or belong to one stage alone."""
    weights = {(Source.STATE.value, spec.tensor.name) for spec in party.manifest.state}
    for stage in phase.stages:
        for step in _list_steps(stage, party.graphs[stage.graph]):
            arguments, results = (
                tuple(value[1] if value in weights else "\0".join(value) for value in values)
                for values in (step.arguments, step.makes)
            )
            yield replace(step.node.layer, arguments=arguments, results=results)


def _list_steps(stage: Stage, graph: bytes) -> list[_Step]:
    sources = {item.name: item.source.value for item in stage.inputs}
    outputs = set(stage.outputs)

    def locate(name: str) -> Value:
        if name in sources:
            return sources[name], name
        return (Source.STASH.value if name in outputs else stage.name), name

    steps = [
        _Step(
            node=node,
            reads=tuple(map(locate, node.reads)),
            makes=tuple(map(locate, node.makes)),
            arguments=tuple(map(locate, node.layer.arguments)),
        )
        for node in read_nodes(stage.name, graph)
    ]
    for name in outputs & sources.keys():  # handed through
        layer = LayerNode(operator="Identity", arguments=(name,), results=(name,))
        node = GraphNode(name=name, operator="Identity", reads=(name,), makes=(name,), layer=layer)
        read, made = (locate(name),), ((Source.STASH.value, name),)
        steps.append(_Step(node=node, reads=read, makes=made, arguments=read))
    return steps
