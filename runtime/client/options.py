"""What a fit is to do, as checked values; who carries it out is the client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from splitonnx.errors import UsageError
from splitonnx.runtime.client.datasets import Dataset
from splitonnx.runtime.client.histories import Evaluation, StepRecord
from splitonnx.runtime.client.runners import WhenUnsaved

LearningRate: TypeAlias = float | Callable[[int], float] | None
"""A constant, or a function of the updates so far; ``None`` is the optimizer's own."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What a fit is to do; :meth:`Client.fit` says what each means."""

    training: Dataset
    held_out: Dataset | None
    epochs: int
    learning_rate: LearningRate
    checkpoint_every: int | None
    when_unsaved: WhenUnsaved
    save: bool
    on_step: Callable[[StepRecord], None] | None
    on_epoch: Callable[[Evaluation], None] | None


def require_positive(**counts: int | None) -> None:
    """Raise unless each of the arguments that is given is at least 1.

    Raises:
        UsageError: it names the one that is not.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name} must be at least 1, not {count}")
