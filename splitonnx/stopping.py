"""Early stopping: which evaluation of a run is the best, and when to stop waiting for a better one.

This module compares numbers; the client keeps the states and returns to the best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from splitonnx.errors import UsageError

LOWER_IS_BETTER = frozenset({"loss", "mae", "mse", "rmse", "perplexity"})
"""The metrics that are better if they are lower; all others are better if they are higher."""


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Keep the state of the best evaluation, and stop when no better one comes.

    ``metric`` is the name of one of the numbers that an evaluation computes.  What follows a dot in
    it is the name of a loss, such as in ``loss.boxes``.  ``mode`` says whether
    lower (``min``) or higher (``max``) numbers are better; by default, the metric's name decides.
    Training stops after ``patience`` evaluations in a row that are not better by more than
    ``min_delta``.  If ``patience`` is ``None``, it does not stop early.
    """

    metric: str
    patience: int | None = 5
    mode: Literal["min", "max"] | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in (None, "min", "max"):
            raise UsageError(f"the mode of early stopping must be min or max, not {self.mode}")
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"patience must be at least 1, not {self.patience}")
        if not 0 <= self.min_delta < math.inf:
            raise UsageError(f"min_delta must be at least 0 and finite, not {self.min_delta:g}")

    @property
    def is_lower_better(self) -> bool:
        """Return whether lower numbers are better."""
        if self.mode is not None:
            return self.mode == "min"
        return self.metric.partition(".")[0] in LOWER_IS_BETTER

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether a number is better than the best so far; ``None`` means there is none."""
        if not math.isfinite(value):
            return False
        if best is None:
            return True
        return (best - value if self.is_lower_better else value - best) > self.min_delta

    def is_over(self, waited: int) -> bool:
        """Return whether training stops after ``waited`` evaluations that were not better."""
        return self.patience is not None and waited >= self.patience

    def __str__(self) -> str:
        direction = "min" if self.is_lower_better else "max"
        patience = "" if self.patience is None else f", patience {self.patience}"
        delta = f", min_delta {self.min_delta:g}" if self.min_delta else ""
        return f"{self.metric} {direction}{patience}{delta}"
