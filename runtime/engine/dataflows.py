"""Which stages of a phase can run, which values can be sent, and which can be released.

Pure bookkeeping on names, based on the manifest's phase: it holds no tensors, runs nothing and
sends nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from splitonnx.manifests import Phase, Source, Stage


class Dataflow:
    """The inputs and outputs of one party's phase; computed once and valid for every task.

    ``receives`` and ``sends`` name the wires to and from this party.  ``stages`` are in the
    manifest's order, which decides between several stages that can run.
    """

    def __init__(self, phase: Phase, party: str) -> None:
        self.stages = phase.stages
        self.receives = frozenset(w.tensor.name for w in phase.wires if w.receiver == party)
        self.sends = tuple(w.tensor.name for w in phase.wires if w.sender == party)
        self.needs = {
            stage.name: frozenset(i.name for i in stage.inputs if i.source is not Source.STATE)
            for stage in phase.stages
        }
        self.kept = frozenset(phase.results) | frozenset(phase.commits.values())
        """Values that outlive the stages: results and the state's replacements."""
        self.uses = Counter(name for names in self.needs.values() for name in names)
        self.uses.update(self.sends)
        """How many stages and outgoing wires take a value."""

    def wants(self, name: str) -> bool:
        """Return whether anything needs this value, so that it must be kept."""
        return self.uses[name] > 0 or name in self.kept

    def start(self) -> Progress:
        """Start tracking a new task, without any values."""
        return Progress(self)


class Progress:
    """The progress of one task."""

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow
        self._present: set[str] = set()
        self._waiting = list(flow.stages)
        self._unsent = list(flow.sends)
        self._uses = flow.uses.copy()

    @property
    def is_finished(self) -> bool:
        """Return whether every stage ran and every wire was received and sent."""
        return not self._waiting and not self._unsent and not self.missing

    @property
    def missing(self) -> frozenset[str]:
        """Return the wires that have not arrived."""
        return self._flow.receives - self._present

    def arrive(self, names: Iterable[str]) -> None:
        """Record that values are available: data, scalars, wires, or stage outputs."""
        self._present.update(names)

    def next_stage(self) -> Stage | None:
        """Return the first stage whose inputs are available, and count it as run, or ``None``."""
        for index, stage in enumerate(self._waiting):
            if self._flow.needs[stage.name] <= self._present:
                return self._waiting.pop(index)
        return None

    def next_wires(self) -> tuple[str, ...]:
        """Return the outgoing wires that are available and were not returned before."""
        ready = tuple(name for name in self._unsent if name in self._present)
        self._unsent = [name for name in self._unsent if name not in self._present]
        return ready

    def release(self, names: Iterable[str]) -> tuple[str, ...]:
        """Record one use of each value; return the values that are no longer needed."""
        self._uses.subtract(names := tuple(names))
        return tuple(n for n in names if self._uses[n] <= 0 and n not in self._flow.kept)
