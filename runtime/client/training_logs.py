"""Logs of a training run: tables as CSV, and event files that TensorBoard shows.

A log belongs to a folder::

    steps.csv, epochs.csv    one row for each step, and for each evaluation
    train/, evaluation/      the same numbers as TensorBoard's event files

A run that is resumed continues the log, and each step has one row.  The client passes the records;
this module does not train.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TextIO

from splitonnx.atomic import replace_file
from splitonnx.errors import UnwritableFile, UsageError
from splitonnx.extras import load
from splitonnx.runtime.client.histories import Evaluation, StepRecord

_STEP = "step"
_EVENTS = "events.out.tfevents.*"


class TrainingLog:
    """The log of a training run in a folder; pass :meth:`add_step` and others to ``Client.fit``.

    Use the log as a context manager, or call :meth:`close`.

    Args:
        folder: the folder, which is created if it does not exist.
        step: the step at which training begins: ``client.steps``.
        resumes: remove rows of later steps than ``step``, which will be repeated.
        tensorboard: write event files for TensorBoard, too.

    Raises:
        UsageError: the folder has the log of another run, which is at a later step.
        MissingExtra: event files need a package that is not installed.
        UnwritableFile: the folder cannot be written.
    """

    def __init__(
        self, folder: str | Path, *, step: int = 0, resumes: bool = False, tensorboard: bool = True
    ) -> None:
        folder = Path(folder)
        purpose = "a log for TensorBoard, which --no-tensorboard leaves out,"
        library = load("tensorboardX", purpose) if tensorboard else None
        self._step = step
        with _naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._steps = _Series(folder / "steps.csv", folder / "train", library)
            self._epochs = _Series(folder / "epochs.csv", folder / "evaluation", library)
            for series in (self._steps, self._epochs):
                if resumes:
                    series.cut(step)
                elif series.last > step:
                    raise UsageError(
                        f"the log in {folder} goes on to step {series.last}, and this training "
                        f"begins at step {step}; choose another folder for it"
                    )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add_step(self, record: StepRecord) -> None:
        """Write the record of a step; it replaces an earlier one of the same step.

        Raises:
            UsageError: the log has other columns than the record.
            UnwritableFile: the files cannot be written.
        """
        self._step = record.step
        figures = {"loss": record.loss, **record.metrics, "learning_rate": record.learning_rate}
        position = {"epoch": record.epoch, "batch": record.batch}
        costs = {
            "samples": record.samples,
            "seconds": record.seconds,
            "bytes_up": record.bytes_up,
            "bytes_down": record.bytes_down,
        }
        self._steps.add({_STEP: record.step, **position, **figures, **costs}, figures)

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Write the record of an evaluation, at the newest step.

        Raises:
            UsageError: the log has other columns than the record.
            UnwritableFile: the files cannot be written.
        """
        row = {_STEP: self._step, "epoch": evaluation.epoch, **evaluation.metrics}
        self._epochs.add({**row, "seconds": evaluation.seconds}, evaluation.metrics)

    def close(self) -> None:
        """Close the files; may be called twice."""
        for series in (self._steps, self._epochs):
            series.close()


class _Series:
    """One table with a column for the step, and the event files of the same numbers."""

    def __init__(self, path: Path, events: Path, library: ModuleType | None) -> None:
        self._path = path
        self._events = events
        self._library = library
        self._file: TextIO | None = None
        self._writer: Any = None
        self._purged: int | None = None  # TensorBoard hides what came before at this step or later
        self._header, rows = _read(path)
        self.last = _find_step(rows, self._header)

    def add(self, row: Mapping[str, object], figures: Mapping[str, float]) -> None:
        """Append a row; remove rows of this step and of later ones before."""
        step = int(str(row[_STEP]))
        with _naming(self._path):
            if self._header and self._header != list(row):
                raise UsageError(
                    f"{self._path} has the columns {', '.join(self._header)}, and this training "
                    f"{', '.join(row)}; choose another folder for its log"
                )
            if step <= self.last:
                self.cut(step - 1)
            if self._file is None:
                self._file = self._path.open("a", newline="", encoding="utf-8")
            writer = csv.writer(self._file, lineterminator="\n")
            if not self._header:
                self._header = list(row)
                writer.writerow(self._header)
            writer.writerow(row.values())
            self._file.flush()
            self.last = step
            if self._library is not None:
                self._add_events(self._library, step, figures)

    def cut(self, step: int) -> None:
        """Remove the rows after ``step``, and rows that were not written to their end."""
        self.close()
        header, rows = _read(self._path)
        kept = [row for row in rows if _find_step([row], header) <= step]
        self.last = _find_step(kept, header)
        self._purged = step + 1
        if self._path.exists():
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([header, *kept] if header else [])
            replace_file(self._path, [text.getvalue().encode()])

    def close(self) -> None:
        """Close the files; :meth:`add` opens them again."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        self._file = self._writer = None

    def _add_events(self, library: ModuleType, step: int, figures: Mapping[str, float]) -> None:
        if self._writer is None:
            before = len(list(self._events.glob(_EVENTS)))
            self._writer = library.SummaryWriter(
                str(self._events),
                purge_step=self._purged if before else None,
                filename_suffix=f".{before}",  # files of the same second need different names
            )
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read the header and the complete rows of a table; both are empty without a file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(line for line in file if line.endswith("\n")))
    except FileNotFoundError:
        return [], []
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not the log of a training run: {error}") from error
    if lines and _STEP not in lines[0]:
        raise UsageError(f"{path} is not the log of a training run: it has no column 'step'")
    header = lines[0] if lines else []
    return header, [line for line in lines[1:] if len(line) == len(header)]


def _find_step(rows: Sequence[Sequence[str]], header: Sequence[str]) -> int:
    """Return the step of the last row, or -1 without rows."""
    if not rows:
        return -1
    text = rows[-1][list(header).index(_STEP)]
    if not text.isdecimal():
        raise UsageError(f"the log has a row of step '{text}', which is not a number")
    return int(text)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnwritableFile(str(path), error.strerror or str(error)) from error
