"""Options for early stopping and for keeping the best weights, and functions that parse them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from splitonnx.errors import UsageError
from splitonnx.stopping import EarlyStopping

PATIENCE = 5
"""The default number of evaluations without a better one after which training stops."""


@dataclass(frozen=True, kw_only=True)
class StoppingOptions:
    """The options for early stopping and for keeping the best weights."""

    early_stop: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC[=min|max]",
            help="Stop when this number of the evaluation does not become better, and keep the "
            "best weights: loss, or a metric.",
            show_default=False,
        ),
    ] = None
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Evaluations without a better one after which --early-stop stops.",
            show_default=str(PATIENCE),
        ),
    ] = None
    keep_best: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC[=min|max]",
            help="Keep the weights of the best evaluation, without stopping early.",
            show_default=False,
        ),
    ] = None

    def read(self) -> EarlyStopping | None:
        """Return the settings of early stopping, or ``None`` if no option was given.

        Raises:
            UsageError: an option is malformed, or the options contradict each other.
        """
        if self.early_stop is not None and self.keep_best is not None:
            raise UsageError("--early-stop and --keep-best exclude each other: the first keeps it")
        if self.patience is not None and self.early_stop is None:
            raise UsageError("--patience needs --early-stop")
        if self.early_stop is not None:
            return _read("--early-stop", self.early_stop, self.patience or PATIENCE)
        return None if self.keep_best is None else _read("--keep-best", self.keep_best, None)


def _read(option: str, text: str, patience: int | None) -> EarlyStopping:
    metric, mark, mode = text.partition("=")
    if not metric or (mark and mode not in ("min", "max")):
        raise UsageError(f"{option} {text}: write it as METRIC, METRIC=min or METRIC=max")
    if not mark:
        return EarlyStopping(metric=metric, patience=patience)
    return EarlyStopping(metric=metric, patience=patience, mode="min" if mode == "min" else "max")
