"""Show the progress of a training on stderr, and its results on stdout, or nothing at all."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from splitonnx.commands.printing import (
    make_table,
    open_console,
    print_item,
    print_json_lines,
    print_remark,
)
from splitonnx.commands.rows import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from splitonnx.runtime.client.clients import Client
    from splitonnx.runtime.client.histories import Evaluation, History, StepRecord
    from splitonnx.runtime.engine.placements import Placement


class TrainingDisplay(ABC):
    """Base class of the training displays :class:`Bar`, :class:`Lines` and :class:`Silence`."""

    @contextmanager
    def showing(self, steps: int | None) -> Iterator[None]:
        """Show progress during a ``with`` block.

        ``steps`` is the expected number of steps, or ``None`` if it is unknown.
        """
        yield

    @abstractmethod
    def show_step(self, record: StepRecord) -> None:
        """Show the loss and other figures of one step."""

    @abstractmethod
    def show_evaluation(self, evaluation: Evaluation) -> None:
        """Show the evaluation at the end of an epoch."""

    @abstractmethod
    def show_placement(self, placement: Placement) -> None:
        """Show which nodes an execution provider leaves to the CPU, and the time they take."""

    @abstractmethod
    def summarize(self, history: History, saved: str, peak: int | None = None) -> None:
        """Show the result of the training; ``saved`` describes where it was saved.

        ``peak`` is the most memory that this process had resident, in bytes, if it is known.
        """


def choose_display(*, as_json: bool, quiet: bool, epochs: int) -> TrainingDisplay:
    """Return the training display for the given options."""
    if quiet:
        return Silence()
    return Lines() if as_json else Bar(epochs)


class PlacementNote:
    """Shows once what a client's execution provider left to the CPU; nothing for the CPU itself.

    The second step of a training is the first one that takes as long as those after it.
    """

    def __init__(self, client: Client, display: TrainingDisplay) -> None:
        self._client = client
        self._display = display
        self._steps = 0

    def add_step(self, record: StepRecord) -> None:
        """Show it after the second step."""
        self._steps += 1
        if self._steps == 2:
            self._show()

    def finish(self) -> None:
        """Show at the end of a training with a single step what is known."""
        if self._steps < 2:
            self._show()

    def _show(self) -> None:
        placement = self._client.placement
        if placement is not None:
            self._display.show_placement(placement)


class Silence(TrainingDisplay):
    """A display that prints nothing."""

    def show_step(self, record: StepRecord) -> None:
        """Show nothing."""

    def show_evaluation(self, evaluation: Evaluation) -> None:
        """Show nothing."""

    def show_placement(self, placement: Placement) -> None:
        """Show nothing."""

    def summarize(self, history: History, saved: str, peak: int | None = None) -> None:
        """Show nothing."""


class Lines(TrainingDisplay):
    """A display that prints each step and each evaluation to stdout as one line of JSON."""

    def show_step(self, record: StepRecord) -> None:
        """Print the step's record as a JSON line."""
        print_json_lines([record])

    def show_evaluation(self, evaluation: Evaluation) -> None:
        """Print the evaluation's record as a JSON line."""
        print_json_lines([evaluation])

    def show_placement(self, placement: Placement) -> None:
        """Print what is known of the provider as a JSON line."""
        print_json_lines([{"placement": placement.summarize()}])

    def summarize(self, history: History, saved: str, peak: int | None = None) -> None:
        """Print the evaluation whose state was kept, if there is one, and the peak of memory."""
        print_json_lines([] if history.best is None else [{"best": history.best}])
        print_json_lines([] if peak is None else [{"memory": {"peak_bytes": peak}}])


class Bar(TrainingDisplay):
    """A display with a progress bar and evaluations on stderr, and a summary on stdout."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._steps: int | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @contextmanager
    def showing(self, steps: int | None) -> Iterator[None]:
        """Show the progress bar while the ``with`` block runs."""
        self._steps = steps
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", table_column=Column()),  # may wrap
        )
        with Progress(*columns, console=open_console(sys.stderr)) as progress:
            self._progress = progress
            self._task = progress.add_task(self._name_epoch(0), total=steps, figures="")
            yield

    def show_step(self, record: StepRecord) -> None:
        """Advance the bar to the step in ``record``, and show the step's loss and other figures."""
        assert self._progress is not None
        assert self._task is not None
        figures = {"loss": record.loss, **record.metrics}
        text = [f"{name} {value:.4f}" for name, value in figures.items()]
        text.append(f"lr {record.learning_rate:.3g}")
        text.append(f"{record.samples_per_second:,.0f} samples/s")
        if record.bytes_up or record.bytes_down:
            up, down = format_bytes(record.bytes_up), format_bytes(record.bytes_down)
            text.append(f"{up} up {down} down")
        self._progress.update(
            self._task,
            completed=self._count_steps(record),
            description=self._name_epoch(record.epoch),
            figures="  ".join(text),
        )

    def _count_steps(self, record: StepRecord) -> int:
        per_epoch = 0 if self._steps is None else self._steps // self._epochs
        return record.epoch * per_epoch + record.batch

    def show_evaluation(self, evaluation: Evaluation) -> None:
        """Print the evaluation above the bar."""
        assert self._progress is not None
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
        self._progress.print(f"{self._name_epoch(evaluation.epoch)}  held out: {metrics}")

    def show_placement(self, placement: Placement) -> None:
        """Print a remark above the bar."""
        print_remark(placement.describe())

    def summarize(self, history: History, saved: str, peak: int | None = None) -> None:
        """Print the totals of the training, and where the result was saved."""
        steps = history.steps
        up = sum(record.bytes_up for record in steps)
        down = sum(record.bytes_down for record in steps)
        figures = {
            "steps": str(len(steps)),
            "seconds": f"{sum(record.seconds for record in steps):.2f}",
            "samples/s": f"{history.samples_per_second:,.0f}",
        }
        if up or down:
            figures["up / step"] = format_bytes(up // len(steps))
            figures["down / step"] = format_bytes(down // len(steps))
        if peak is not None:
            figures["peak memory"] = format_bytes(peak)
        last = history.evaluations[-1].metrics if history.evaluations else {}
        figures |= {f"held-out {name}": f"{value:.4f}" for name, value in last.items()}
        table = make_table()
        for heading in figures:
            table.add_column(heading, justify="right")
        table.add_row(*figures.values())
        print_item(table)
        if history.best is not None:
            best = f"epoch {history.best.epoch + 1}, step {history.best.step}"
            print_item(f"the weights are those after {best}, the best ones")
        print_item(saved)

    def _name_epoch(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self._epochs}"
