"""What belongs to one task or step: its values, its scalars, and what its micro-batches changed.

A step of several micro-batches changes the state only as a whole.  Until its update is committed,
the sums of gradients, and the running statistics and carried states that each micro-batch replaces,
are kept beside the state.  A step that is abandoned therefore leaves the state as it was.  Several
micro-batches may be open at once, and read the same values as if each had waited for the one before
it.  This module runs no stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from splitonnx.errors import LocalProtocolError, UsageError
from splitonnx.manifests import (
    KEY,
    LEARNING_RATE,
    STEP,
    PartyManifest,
    Phase,
    Source,
    Stage,
    WireKind,
)
from splitonnx.messages import TaskKey
from splitonnx.names import ACCUMULATE, STEP_PHASES, UPDATE
from splitonnx.runtime.engine.dataflows import Dataflow, Progress
from splitonnx.runtime.engine.engines import Engine, LoadedStage, Tensor
from splitonnx.tensors import DTYPES, check_array


@dataclass(kw_only=True)
class RunningStage:
    """A stage that has begun: the part of it that runs next, and all that was given to it."""

    stage: Stage
    part: LoadedStage
    feeds: dict[str, Tensor]


@dataclass(kw_only=True)
class OpenTask:
    """A task that is running: its values that something still needs, and its sizes.

    ``reread`` is the state that a stage reads again later, as it was when it was first read.
    """

    key: TaskKey
    phase: Phase
    flow: Dataflow
    progress: Progress
    values: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    reread: dict[str, Tensor] = field(default_factory=dict)
    running: RunningStage | None = None

    @property
    def is_finished(self) -> bool:
        """Return whether all stages have run, and all tensors have been received or sent."""
        return self.running is None and self.progress.is_finished

    def feed(self, stage: Stage, read: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """Return a stage's inputs; ``read`` returns a tensor of the state as it is now, or nothing.

        Another task may have replaced the state since a stage ran whose values are made again.
        """
        names = [i.name for i in stage.inputs if i.source is Source.STATE]
        own = {name: tensor for name in names if (tensor := read(name)) is not None}
        for name in own.keys() & self.flow.reread:
            first = self.reread.setdefault(name, own[name])
            if stage.awaited:
                own[name] = first
        return own | {
            i.name: self.values[i.name] for i in stage.inputs if i.source is not Source.STATE
        }

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Record that values are there, and keep those that something needs."""
        self.values.update((n, t) for n, t in tensors.items() if self.progress.wants(n))
        self.progress.arrive(tensors)

    def check_wires(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Check tensors that are sent or were received, and record the sizes that they have.

        Raises:
            ArrayMismatch, ValueOutOfRange: a tensor does not match its declaration.
        """
        for wire in self.phase.wires:
            if wire.tensor.name in tensors:
                is_output = wire.kind is WireKind.OUTPUT
                check_array(tensors[wire.tensor.name], wire.tensor, self.sizes, is_output=is_output)


class OpenStep:
    """What the micro-batches of a party's running step have changed; empty between two steps.

    Several tasks of the step may be open at once, begun and finished in the order of their numbers.
    A state that micro-batches change has a *version* for each: micro-batch ``n`` reads version
    ``n`` and makes version ``n + 1``, and the update reads the last one.  Version 0 is the party's
    state, or zeros for a sum.  Whatever the order in which stages run, they therefore read what
    they would read if each task were finished before the next begins.  A version is freed when
    nothing can read it any more.

    ``micro_batches`` is the number of micro-batches that were finished.
    """

    def __init__(self, manifest: PartyManifest, engine: Engine) -> None:
        self.micro_batches = 0
        self._begun = 0
        self._is_updating = False
        self._manifest = manifest
        self._engine = engine
        self._sums = {spec.name: spec for spec in manifest.accumulators}
        self._commits = manifest.phase(ACCUMULATE).commits
        self._reads = {
            phase: {stage.name: self._list_read(stage) for stage in manifest.phase(phase).stages}
            for phase in (ACCUMULATE, UPDATE)
        }
        self._versions: dict[str, dict[int, Tensor]] = {name: {} for name in self._commits}
        self._unread: dict[int, Counter[str]] = {}  # by micro-batch: stages that will read a state

    def start_anew(self) -> OpenStep:
        """Return an empty one for the same party."""
        return OpenStep(self._manifest, self._engine)

    def check_next(self, key: TaskKey, step: int) -> None:
        """Check that a task is the next one of a party that is at ``step``, or belongs to no step.

        Raises:
            LocalProtocolError: it belongs to another step, or is not the step's next micro-batch.
        """
        if key.phase not in STEP_PHASES:
            return
        if key.step != step:
            raise LocalProtocolError(f"to {key.phase} at step {key.step}; the next is {step}")
        is_part = key.phase in (ACCUMULATE, UPDATE)
        if self._begun != (key.micro_batch if is_part else 0):
            raise LocalProtocolError(
                f"to {key.phase} micro-batch {key.micro_batch} of step {step}; "
                f"{self._begun} were begun"
            )
        if self._is_updating:
            raise LocalProtocolError(f"to {key.phase} at step {step}, which is being updated")
        if key.phase == UPDATE and not self._begun:
            raise LocalProtocolError(f"to update at step {step}, but nothing was accumulated")

    def begin(self, key: TaskKey) -> None:
        """Record that a task was begun, which :meth:`check_next` has checked."""
        if key.phase not in (ACCUMULATE, UPDATE):
            return
        self._begun += key.phase == ACCUMULATE
        self._is_updating = key.phase == UPDATE
        reads = self._reads[key.phase].values()
        self._unread[key.micro_batch] = Counter(name for names in reads for name in names)

    def is_ready(self, key: TaskKey, stage: Stage) -> bool:
        """Return whether what a stage of an open task reads of the step's changes is there.

        An update reads nothing before all micro-batches are finished.
        """
        if key.phase == UPDATE:
            return self.micro_batches == key.micro_batch
        if key.phase != ACCUMULATE or key.micro_batch == 0:
            return True
        names = self._reads[ACCUMULATE][stage.name]
        return all(key.micro_batch in self._versions[name] for name in names)

    def read(self, state: Mapping[str, Tensor], key: TaskKey, name: str) -> Tensor:
        """Return a tensor of a party's ``state`` as a task reads it."""
        if key.phase in (ACCUMULATE, UPDATE):
            if (found := self._versions.get(name, {}).get(key.micro_batch)) is not None:
                return found
            if name in self._sums:
                return self._make_zeros(name)
        return state[name]

    def find(
        self, state: Mapping[str, Tensor], key: TaskKey, zeros: Collection[str], name: str
    ) -> Tensor | None:
        """Return the same; ``None`` if it is zero and, as one of ``zeros``, may be left out."""
        is_left_out = name in zeros and self.is_zero(key, name)
        return None if is_left_out else self.read(state, key, name)

    def is_zero(self, key: TaskKey, name: str) -> bool:
        """Return whether a task of the phase ``accumulate`` reads a sum of nothing."""
        return name in self._sums and key.micro_batch not in self._versions[name]

    def add(self, key: TaskKey, values: Mapping[str, Tensor]) -> None:
        """Record what a task has changed, if its new values are among ``values``."""
        if key.phase != ACCUMULATE:
            return
        for name, value in self._commits.items():
            if value in values:
                self._versions[name][key.micro_batch + 1] = values[value]
                self._drop_read(name, key.micro_batch)

    def note_run(self, key: TaskKey, stage: Stage) -> None:
        """Record that a stage has run, and free what no later stage reads."""
        if key.phase not in (ACCUMULATE, UPDATE):
            return
        for name in self._reads[key.phase][stage.name]:
            self._unread[key.micro_batch][name] -= 1
            self._drop_read(name, key.micro_batch)

    def check_end(self, key: TaskKey) -> None:
        """Check that the tasks before a task were finished.

        Raises:
            LocalProtocolError: one is not.
        """
        if key.phase in (ACCUMULATE, UPDATE) and key.micro_batch != self.micro_batches:
            raise LocalProtocolError(
                f"to finish micro-batch {key.micro_batch} of step {key.step}; "
                f"{self.micro_batches} were finished"
            )

    def end(self, key: TaskKey) -> None:
        """Record that a micro-batch is finished."""
        del self._unread[key.micro_batch]
        self.micro_batches += 1

    def close(self) -> dict[str, Tensor]:
        """End the step, and return what its micro-batches have changed in the state."""
        changed = {
            name: versions[self.micro_batches]
            for name, versions in self._versions.items()
            if name not in self._sums and self.micro_batches in versions
        }
        self.reset()
        return changed

    def reset(self) -> None:
        """Forget what the step's micro-batches have changed."""
        self._versions = {name: {} for name in self._commits}
        self._unread = {}
        self.micro_batches = self._begun = 0
        self._is_updating = False

    def _list_read(self, stage: Stage) -> tuple[str, ...]:
        return tuple(
            i.name for i in stage.inputs if i.source is Source.STATE and i.name in self._commits
        )

    def _drop_read(self, name: str, number: int) -> None:
        """Free the version of a state that task ``number`` reads, if it will not read it again."""
        if self._unread[number][name]:
            return
        versions = self._versions[name]
        is_last = self._is_updating and number == self._begun  # the update's own
        if number + 1 in versions or (is_last and name in self._sums):
            versions.pop(number, None)

    def _make_zeros(self, name: str) -> Tensor:
        spec = self._sums[name]
        shape = tuple(dim for dim in spec.shape if isinstance(dim, int))
        return self._engine.from_array(np.zeros(shape, DTYPES[spec.dtype]))


def make_scalars(key: TaskKey, seed: int, learning_rate: float) -> dict[str, np.ndarray]:
    """Make the scalar inputs of stages from values that the other party may have sent.

    Raises:
        UsageError: one of them is out of range for its tensor.
    """
    numbers = (seed, key.step, key.micro_batch)
    if min(numbers) < 0 or max(numbers) >= np.iinfo(np.int64).max:
        raise UsageError(f"seed, step and micro-batch must be below 2^63, not {numbers}")
    if not 0 <= learning_rate <= float(np.finfo(np.float32).max):  # NaN fails too
        raise UsageError(f"the learning rate must be finite and not negative, not {learning_rate}")
    return {
        KEY: np.array(numbers, np.int64),
        LEARNING_RATE: np.array(learning_rate, np.float32),
        STEP: np.array(key.step + 1, np.int64),
    }
