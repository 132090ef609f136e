"""Options for the log of a training run, and functions that open it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from splitonnx.errors import UsageError

if TYPE_CHECKING:
    from splitonnx.runtime.client.training_logs import TrainingLog

_Record = TypeVar("_Record")


@dataclass(frozen=True, kw_only=True)
class TrainingLogOptions:
    """The options for the log of a training run."""

    log_dir: Annotated[
        Path | None,
        typer.Option(
            "--log-dir",
            metavar="DIR",
            help="Write the figures of steps and epochs to this folder, as CSV and for "
            "TensorBoard.",
            show_default=False,
        ),
    ] = None
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard/--no-tensorboard", help="With --log-dir: event files.")
    ] = True

    def open(self, *, step: int, resumes: bool) -> AbstractContextManager[TrainingLog | None]:
        """Open the log; without ``--log-dir``, the context's value is ``None``.

        ``step`` is the step at which training begins, and ``resumes`` says whether the log may
        have later ones, which are repeated.

        Raises:
            UsageError: the options contradict each other, or the folder has another run's log.
            MissingExtra: event files need a package that is not installed.
            UnwritableFile: the folder cannot be written.
        """
        if self.log_dir is None:
            if not self.tensorboard:
                raise UsageError("--no-tensorboard needs --log-dir")
            return nullcontext()
        from splitonnx.runtime.client.training_logs import TrainingLog

        return TrainingLog(self.log_dir, step=step, resumes=resumes, tensorboard=self.tensorboard)


def call_both(
    first: Callable[[_Record], None], second: Callable[[_Record], None]
) -> Callable[[_Record], None]:
    """Return a function that passes a record to both functions, one after the other."""

    def call(record: _Record) -> None:
        first(record)
        second(record)

    return call
