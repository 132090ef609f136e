"""The data flow of a phase: which stages can run, and which values can be sent or released.

Everything is computed from the names in the manifest.  This module holds no tensors, runs no stages
and sends nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from splitonnx.manifests import PartyManifest, Phase, Source, Stage
from splitonnx.names import ACCUMULATE, TRAIN


class Dataflow:
    """One party's stages in a phase, and the values that these stages need and produce.

    One object serves all tasks of the phase.  ``receives`` and ``sends`` name the tensors that this
    party receives from and sends to the other party.  ``stages`` are in the manifest's order; if
    several stages can run, the first one in this order runs.
    """

    def __init__(self, phase: Phase, party: str) -> None:
        self.stages = phase.stages
        self.receives = frozenset(w.tensor.name for w in phase.wires if w.receiver == party)
        self.sends = tuple(w.tensor.name for w in phase.wires if w.sender == party)
        self.needs = {
            stage.name: frozenset(i.name for i in stage.inputs if i.source is not Source.STATE)
            | frozenset(stage.awaited)
            for stage in phase.stages
        }
        self.kept = frozenset(phase.results)
        """Values that are still needed after all stages have run: results and new state.

        What a micro-batch changes is kept elsewhere, since the next one may read it before.
        """
        if phase.name != ACCUMULATE:
            self.kept |= frozenset(phase.commits.values())
        self.uses = Counter(name for names in self.needs.values() for name in names)
        self.uses.update(self.sends)
        """How many stages and outgoing wires use each value, until a stage makes it again."""
        self.later: dict[str, Counter[str]] = {}
        """For each stage that makes values again: how many stages use each of them from then on."""
        self.reread = frozenset(
            i.name
            for stage in phase.stages
            if stage.awaited
            for i in stage.inputs
            if i.source is Source.STATE
        )
        """The state that is read again, with the values that it had when it was first read."""
        for index, stage in reversed(list(enumerate(phase.stages))):
            if stage.awaited:
                after = Counter(n for s in phase.stages[index + 1 :] for n in self.needs[s.name])
                self.later[stage.name] = Counter({name: after[name] for name in stage.outputs})
                self.uses.subtract(self.later[stage.name])

    def start(self) -> Progress:
        """Start tracking a new task, for which no values are available yet."""
        return Progress(self)


class Progress:
    """The progress of one task: which values are available, and what remains to be run and sent."""

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow
        self._present: set[str] = set()
        self._waiting = list(flow.stages)
        self._unsent = list(flow.sends)
        self._uses = flow.uses.copy()

    @property
    def is_finished(self) -> bool:
        """Return whether all stages have run and all tensors have been received or sent."""
        return not self._waiting and not self._unsent and not self.missing

    @property
    def missing(self) -> frozenset[str]:
        """Return the names of the tensors that have not arrived from the other party yet."""
        return self._flow.receives - self._present

    def arrive(self, names: Iterable[str]) -> None:
        """Record that values are available: input data, received tensors or stage outputs."""
        self._present.update(names)

    def next_stage(self, is_ready: Callable[[Stage], bool] = lambda _: True) -> Stage | None:
        """Return the next stage whose inputs are all available, or ``None``.

        ``is_ready`` returns whether the state that a stage reads is available.  Each stage is
        returned only once, and counts as run from then on.
        """
        for index, stage in enumerate(self._waiting):
            if self._flow.needs[stage.name] <= self._present and is_ready(stage):
                self._uses.update(self._flow.later.get(stage.name, {}))
                return self._waiting.pop(index)
        return None

    @property
    def has_all_values(self) -> bool:
        """Return whether a stage that did not run needs nothing but the state."""
        return any(self._flow.needs[stage.name] <= self._present for stage in self._waiting)

    def wants(self, name: str) -> bool:
        """Return whether a value is used by a stage, sent, or kept as a result or new state.

        Uses after a stage that makes the value again do not count before that stage is returned.
        """
        return self._uses[name] > 0 or name in self._flow.kept

    def next_wires(self) -> tuple[str, ...]:
        """Return the names of outgoing tensors that have become available since the last call."""
        ready = tuple(name for name in self._unsent if name in self._present)
        self._unsent = [name for name in self._unsent if name not in self._present]
        return ready

    def release(self, names: Iterable[str]) -> tuple[str, ...]:
        """Record one use of each value, and return the names of those that are no longer needed."""
        self._uses.subtract(names := tuple(names))
        return tuple(n for n in names if self._uses[n] <= 0 and n not in self._flow.kept)


def list_steady(phase: Phase, stage: Stage) -> tuple[str, ...]:
    """List the stage's inputs that are the same tensors for all micro-batches of a step.

    A step of one batch reads them once only, so there are none in other phases.
    """
    if phase.name != ACCUMULATE:
        return ()
    state = (entry.name for entry in stage.inputs if entry.source is Source.STATE)
    return tuple(name for name in state if name not in phase.commits)


def list_early(phase: Phase, stage: Stage, party: str) -> tuple[str, ...]:
    """List the stage's outputs that a training step sends, for which the other party waits."""
    if phase.name not in (TRAIN, ACCUMULATE):
        return ()
    sent = {wire.tensor.name for wire in phase.wires if wire.sender == party}
    return tuple(name for name in stage.outputs if name in sent)


def list_sums(manifest: PartyManifest, phase: Phase, stage: Stage) -> dict[str, str]:
    """List the sums that a stage adds to, each with the output that takes its place.

    They are those that nothing else reads in this phase, and whose new value nothing but the next
    micro-batch reads, so that the stage may change them in place.
    """
    if phase.name != ACCUMULATE:
        return {}
    read = Counter(i.name for s in phase.stages for i in s.inputs if i.source is Source.STATE)
    used = {i.name for s in phase.stages for i in s.inputs if i.source is not Source.STATE}
    used |= {*phase.results, *(wire.tensor.name for wire in phase.wires)}
    made = Counter(phase.commits.values())
    own = {i.name for i in stage.inputs if i.source is Source.STATE}
    pairs = {
        spec.name: phase.commits[spec.name]
        for spec in manifest.accumulators
        if spec.name in own and spec.name in phase.commits
    }
    return {
        name: value
        for name, value in pairs.items()
        if value in stage.outputs and read[name] == made[value] == 1 and value not in used
    }


def can_overlap(phase: Phase, party: str) -> bool:
    """Return whether tasks of a phase that follow each other can make progress side by side.

    A stage may read a state that the phase changes.  Then it waits for the stage of the task before
    that changes it.  If that stage needs a received tensor that the reading stage does not need,
    the one task would have to wait for the other's next message.
    """
    needed = _list_received(phase, party)
    of_values = {name: needed[stage.name] for stage in phase.stages for name in stage.outputs}
    of_values.update((w.tensor.name, {w.tensor.name}) for w in phase.wires if w.receiver == party)
    return all(
        of_values.get(phase.commits[i.name], set()) <= needed[stage.name]
        for stage in phase.stages
        for i in stage.inputs
        if i.source is Source.STATE and i.name in phase.commits
    )


def _list_received(phase: Phase, party: str) -> dict[str, set[str]]:
    """Return the received tensors that each stage needs, itself or through other stages."""
    flow = Dataflow(phase, party)
    makers = {name: stage.name for stage in phase.stages for name in stage.outputs}
    needed = {stage: set(names & flow.receives) for stage, names in flow.needs.items()}
    for _ in phase.stages:  # as far as any chain of stages is long
        for stage, names in flow.needs.items():
            for name in names & makers.keys():
                needed[stage] |= needed[makers[name]]
    return needed
