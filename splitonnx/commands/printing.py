"""Print the output of commands as tables, progress bars or JSON; nothing is computed here.

Results go to stdout and progress to stderr, so that either can be redirected.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from splitonnx.commands.check_lines import format_check
from splitonnx.commands.rows import FEW_ROWS, format_bytes, format_rows, list_cells
from splitonnx.names import TRAIN

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from splitonnx.bundles import Bundle
    from splitonnx.partitioner.reports.checks import Check
    from splitonnx.partitioner.reports.inspections import CutCandidate
    from splitonnx.runtime.client.histories import Evaluation, History, StepRecord
    from splitonnx.runtime.engine.exports import Export
    from splitonnx.verifications import Verification


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_json_lines(values: Iterable[object]) -> None:
    """Print each value as one line of JSON, and flush the output after each line."""
    import msgspec

    for value in values:
        print(msgspec.json.encode(value).decode(), flush=True)


def print_check(check: Check, path: Path) -> None:
    """Print what ``check`` found about a model, and whether the model can be trained."""
    from splitonnx.partitioner.reports.checks import Handling

    table = _make_table("operator")
    for heading in Handling:
        table.add_column(heading, justify="right")
    nodes = {(use.operator, use.handling): str(use.nodes) for use in check.operators}
    for operator in dict.fromkeys(use.operator for use in check.operators):
        table.add_row(operator, *(nodes.get((operator, handling), "") for handling in Handling))
    _print(table)
    width = _open_console(sys.stdout).width if sys.stdout.isatty() else None
    for line in format_check(check, path, width):
        _print(line)
    verdict = "[green]can be trained[/]" if check.trainable else "[red]cannot be trained[/]"
    _print(verdict, markup=True)


def print_cuts(cuts: Iterable[CutCandidate]) -> None:
    """Print a table of the tensors at which the model can be cut."""
    sizes = ("up / step", "down / step", "client params", "server params")
    print_rows(("tensor", "operator", "shape"), sizes, [list_cells(cut) for cut in cuts])


def print_rows(names: Sequence[str], sizes: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with left-aligned columns ``names`` and right-aligned columns ``sizes``."""
    if len(rows) > FEW_ROWS:
        lines = format_rows((*names, *sizes), rows, left=len(names))
        sys.stdout.writelines(f"{line}\n" for line in lines)
        return
    table = _make_table(*names)
    for heading in sizes:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    _print(table)


def summarize_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return a summary of a bundle as a dictionary.

    It contains the settings of the cut, and what each party trains, runs and sends.
    """
    from splitonnx.manifests import Role

    def count(name: str, role: Role) -> int:
        state = bundle.parties[name].manifest.state
        return sum(
            bundle.parties[name].weights[s.tensor.name].size for s in state if s.role is role
        )

    return {
        "digest": bundle.manifest.digest,
        "recipe": bundle.manifest.recipe,
        "parties": {
            name: {
                "target": party.manifest.target,
                "parameters": count(name, Role.PARAMETER),
                "frozen": count(name, Role.FROZEN),
                "stages": [stage.name for stage in party.manifest.phase(TRAIN).stages],
                "sends": [
                    {"tensor": w.tensor.name, "kind": w.kind, "declared": str(w.tensor)}
                    for w in party.manifest.phase(TRAIN).wires
                    if w.sender == name
                ],
            }
            for name, party in bundle.parties.items()
        },
    }


def print_bundle(bundle: Bundle, path: Path) -> None:
    """Print a table of what each party trains, runs and sends in one training step."""
    from splitonnx.optimizers import read_optimizer

    summary = summarize_bundle(bundle)
    recipe = bundle.manifest.recipe
    shape = "U-shaped" if recipe.tail_at else "vanilla"
    table = _make_table("party", "kernels")
    table.add_column("params", justify="right")
    table.add_column("stages of a step")
    table.add_column("sends")
    for name, party in summary["parties"].items():
        sends = [f"{w['kind']} {w['tensor']} {w['declared']}" for w in party["sends"]]
        table.add_row(
            name,
            party["target"],
            f"{party['parameters']:,}",
            "\n".join(party["stages"]),
            "\n".join(sends),
        )
    _print(table)
    optimizer = read_optimizer(recipe.optimizer)
    groups = f", parameter groups: {len(optimizer.groups)}" if optimizer.groups else ""
    rate = f"{recipe.optimizer['name']} lr {optimizer.lr:g}"
    losses = " + ".join(loss.kind for loss in recipe.list_losses())
    _print(f"{path}: {shape}, {losses}, {rate}{groups}")


def print_written(path: Path, size: int) -> None:
    """Print the path and size of a file that was written."""
    _print(f"{path}: {format_bytes(size)}")


def summarize_export(export: Export) -> dict[str, Any]:
    """Return the fields of an export as a dictionary, together with the total size."""
    import msgspec

    return {**msgspec.to_builtins(export), "total_bytes": export.total_bytes}


def print_export(export: Export) -> None:
    """Print the size of each exported graph, and the oldest ONNX Runtime that can run them all."""
    table = _make_table("graph")
    for heading in ("nodes", "as .onnx", "as .ort"):
        table.add_column(heading, justify="right")
    for graph in export.graphs:
        before, after = format_bytes(graph.onnx_bytes), format_bytes(graph.ort_bytes)
        table.add_row(graph.name, f"{graph.nodes:,}", before, after)
    for name, size in (("weights", export.weights_bytes), ("state", export.state_bytes)):
        if size:
            table.add_row(f"{name}.safetensors", "", "", format_bytes(size))
    table.add_section()
    table.add_row("altogether", "", "", format_bytes(export.total_bytes))
    _print(table)
    names = {(kernel.domain, kernel.operator) for kernel in export.kernels}
    _print(
        f"{len(names)} operators, all in ONNX Runtime {export.oldest_runtime} or newer: "
        "onnxruntime-android, onnxruntime-c and -objc, onnxruntime-react-native; for a build with "
        "no others see required_operators.config"
    )
    _print(f"{export.path}: converted by {export.converter}")


def print_outputs(path: Path, outputs: Mapping[str, np.ndarray]) -> None:
    """Print the path of the output file, and the name, dtype and shape of each array in it."""
    from splitonnx.tensors import describe

    arrays = ", ".join(f"{name} {describe(array)}" for name, array in outputs.items())
    _print(f"{path}: {arrays}")


def print_output_files(folder: Path, count: int) -> None:
    """Print the path of a folder of outputs, and the number of files in it."""
    _print(f"{folder}: {count:,} {'file' if count == 1 else 'files'}")


def summarize_verification(verification: Verification) -> Iterator[dict[str, Any]]:
    """Yield one dictionary for each step that was compared, and then one with the verdict."""
    for step in verification.steps:
        yield {
            "step": step.step + 1,
            "split_loss": step.split_loss,
            "whole_loss": step.whole_loss,
            "difference": step.difference,
        }
    yield {
        "largest_difference": verification.largest_difference,
        "rtol": verification.rtol,
        "ok": verification.ok,
    }


def print_verification(verification: Verification) -> None:
    """Print a table that compares the losses after each step, and then the verdict."""
    table = _make_table()
    for heading in ("step", "loss split", "loss whole", "largest difference"):
        table.add_column(heading, justify="right")
    table.add_column("in")
    for step in verification.steps:
        worst = max(step.differences, key=step.differences.__getitem__)
        table.add_row(
            str(step.step + 1),
            f"{step.split_loss:.6f}",
            f"{step.whole_loss:.6f}",
            f"{step.difference:.2g}",
            worst if step.difference else "",
        )
    _print(table)
    verdict = "[green]equal[/]" if verification.ok else "[red]not equal[/]"
    largest, rtol = verification.largest_difference, verification.rtol
    _print(f"{verdict}: largest relative difference {largest:.2g}, allowed {rtol:g}", markup=True)


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
    def summarize(self, history: History, saved: str) -> None:
        """Show the result of the training; ``saved`` describes where it was saved."""


def choose_display(*, as_json: bool, quiet: bool, epochs: int) -> TrainingDisplay:
    """Return the training display for the given options."""
    if quiet:
        return Silence()
    return Lines() if as_json else Bar(epochs)


class Silence(TrainingDisplay):
    """A display that prints nothing."""

    def show_step(self, record: StepRecord) -> None:
        """Show nothing."""

    def show_evaluation(self, evaluation: Evaluation) -> None:
        """Show nothing."""

    def summarize(self, history: History, saved: str) -> None:
        """Show nothing."""


class Lines(TrainingDisplay):
    """A display that prints each step and each evaluation to stdout as one line of JSON."""

    def show_step(self, record: StepRecord) -> None:
        """Print the step's record as a JSON line."""
        print_json_lines([record])

    def show_evaluation(self, evaluation: Evaluation) -> None:
        """Print the evaluation's record as a JSON line."""
        print_json_lines([evaluation])

    def summarize(self, history: History, saved: str) -> None:
        """Print the evaluation whose state was kept, if there is one; the rest was printed."""
        print_json_lines([] if history.best is None else [{"best": history.best}])


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
        with Progress(*columns, console=_open_console(sys.stderr)) as progress:
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

    def summarize(self, history: History, saved: str) -> None:
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
        last = history.evaluations[-1].metrics if history.evaluations else {}
        figures |= {f"held-out {name}": f"{value:.4f}" for name, value in last.items()}
        table = _make_table()
        for heading in figures:
            table.add_column(heading, justify="right")
        table.add_row(*figures.values())
        _print(table)
        if history.best is not None:
            best = f"epoch {history.best.epoch + 1}, step {history.best.step}"
            _print(f"the weights are those after {best}, the best ones")
        _print(saved)

    def _name_epoch(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self._epochs}"


def _make_table(*headings: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _open_console(file: TextIO) -> Console:
    from rich.console import Console

    # A pipe has no width, and a log that is cut at 80 columns would lose information.
    return Console(file=file, width=None if file.isatty() else 160, highlight=False)


def _print(item: Table | str, *, markup: bool = False) -> None:
    _open_console(sys.stdout).print(item, markup=markup, soft_wrap=isinstance(item, str))
