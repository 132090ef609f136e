"""The options of ``fit``, which the client passes to its training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from splitonnx.errors import UsageError
from splitonnx.runtime.client.datasets import Dataset
from splitonnx.runtime.client.histories import Evaluation, StepRecord
from splitonnx.runtime.client.runners import WhenUnsaved

LearningRate: TypeAlias = float | Callable[[int], float] | None
"""A constant, a function of the number of updates so far, or ``None`` for the optimizer's rate."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The options of :meth:`Client.fit`; see that method for their meaning.

    ``training`` is that method's ``data``, and ``held_out`` is its ``eval_data``.
    """

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
    """Check that each argument is ``None`` or at least 1.

    Raises:
        UsageError: an argument is less than 1; the error names the argument.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name} must be at least 1, not {count}")
