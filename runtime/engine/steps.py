"""What belongs to one task or step: its values, its scalars, and what its micro-batches changed.

A step of several micro-batches changes the state only as a whole.  Until its update is committed,
the sums of gradients, and the running statistics and carried states that each micro-batch replaces,
are kept beside the state.  A step that is abandoned therefore leaves the state as it was.  This
module runs no stages.
"""

from __future__ import annotations

from collections.abc import Mapping
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
)
from splitonnx.messages import TaskKey
from splitonnx.names import ACCUMULATE, STEP_PHASES, UPDATE
from splitonnx.runtime.engine.dataflows import Dataflow, Progress
from splitonnx.runtime.engine.engines import Engine, Tensor
from splitonnx.tensors import DTYPES


@dataclass(kw_only=True)
class OpenTask:
    """A task that is running: its values that something still needs, and its sizes.

    ``reread`` is the state that a stage reads again later, as it was when it was first read.
    """

    phase: Phase
    flow: Dataflow
    progress: Progress
    values: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    reread: dict[str, Tensor] = field(default_factory=dict)

    def feed(self, stage: Stage, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a stage's inputs.

        Another task may have replaced the state since a stage ran whose values are made again.
        """
        own = {i.name: state[i.name] for i in stage.inputs if i.source is Source.STATE}
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


class OpenStep:
    """What the micro-batches of a party's running step have changed; empty between two steps."""

    def __init__(self, manifest: PartyManifest, engine: Engine) -> None:
        self.micro_batches = 0
        self._manifest = manifest
        self._engine = engine
        self._sums = {spec.name: spec for spec in manifest.accumulators}
        self._changed: dict[str, Tensor] = {}

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
        if self.micro_batches != (key.micro_batch if is_part else 0):
            raise LocalProtocolError(
                f"to {key.phase} micro-batch {key.micro_batch} of step {step}; "
                f"{self.micro_batches} were accumulated"
            )
        if key.phase == UPDATE and not self.micro_batches:
            raise LocalProtocolError(f"to update at step {step}, but nothing was accumulated")

    def overlay(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a party's state as the step's micro-batches left it; sums begin at zero."""
        zeros = {} if self.micro_batches else {n: self._make_zeros(n) for n in self._sums}
        return {**state, **zeros, **self._changed}

    def add(self, changes: Mapping[str, Tensor]) -> None:
        """Record what a micro-batch has changed."""
        self._changed.update(changes)
        self.micro_batches += 1

    def close(self) -> dict[str, Tensor]:
        """End the step, and return what its micro-batches have changed in the state."""
        changed = {n: tensor for n, tensor in self._changed.items() if n not in self._sums}
        self.reset()
        return changed

    def reset(self) -> None:
        """Forget what the step's micro-batches have changed."""
        self._changed = {}
        self.micro_batches = 0

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
