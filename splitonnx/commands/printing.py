"""Print the output of commands as tables or JSON; nothing is computed here.

Results go to stdout, so that they can be redirected without the progress of a training, which
:mod:`training_displays` shows on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from splitonnx.commands.check_lines import format_check
from splitonnx.commands.logs import escape
from splitonnx.commands.rows import FEW_ROWS, format_age, format_bytes, format_rows, list_cells
from splitonnx.names import TRAIN

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from splitonnx.bundles import Bundle
    from splitonnx.partitioner.reports.checks import Check
    from splitonnx.partitioner.reports.inspections import CutCandidate
    from splitonnx.runtime.engine.exports import Export
    from splitonnx.runtime.wire.session_lists import SessionEntry, SessionList
    from splitonnx.verifications import Verification

_SESSION_DIGITS = 8


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

    table = make_table("operator")
    for heading in Handling:
        table.add_column(heading, justify="right")
    nodes = {(use.operator, use.handling): str(use.nodes) for use in check.operators}
    for operator in dict.fromkeys(use.operator for use in check.operators):
        table.add_row(operator, *(nodes.get((operator, handling), "") for handling in Handling))
    print_item(table)
    width = open_console(sys.stdout).width if sys.stdout.isatty() else None
    for line in format_check(check, path, width):
        print_item(line)
    verdict = "[green]can be trained[/]" if check.trainable else "[red]cannot be trained[/]"
    print_item(verdict, markup=True)


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
    table = make_table(*names)
    for heading in sizes:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    print_item(table)


def print_sessions(found: SessionList) -> None:
    """Print a table of a server's sessions, and its policy; unprintable characters are escaped."""
    rows = [
        (
            escape(one.session[:_SESSION_DIGITS]),
            escape(one.owner) or "-",
            escape(one.activity),
            format_age(one.seconds_since_left, "connected").replace(" ago", " away"),
            format_age(one.seconds_since_message, "-"),
            str(one.step),
            str(one.version),
            "-" if one.round is None else str(one.round),
            _format_lag(one),
            format_bytes(one.bytes_up),
            format_bytes(one.bytes_down),
            "yes" if one.is_saved else "no",
        )
        for one in found.sessions
    ]
    left = ("session", "owner", "doing", "client", "last message")
    right = ("step", "version", "round", "behind", "up", "down", "saved")
    if rows:
        print_rows(left, right, rows)
    count = len(rows) + found.left_out
    summary = f"{count:,} {'session' if count == 1 else 'sessions'}"
    if found.left_out:
        summary += f", {found.left_out:,} of them not listed"
    summary += f"; policy {escape(found.policy)}"
    print_item(summary if found.rounds is None else f"{summary}, round {found.rounds}")


def _format_lag(one: SessionEntry) -> str:
    """Format how far a session is behind: in rounds, or in steps if there are none."""
    count, unit = one.steps_behind, "step"
    if one.rounds_behind is not None:
        count, unit = one.rounds_behind, "round"
    return "-" if not count else f"{count:,} {unit}{'' if count == 1 else 's'}"


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
    table = make_table("party", "kernels")
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
    print_item(table)
    optimizer = read_optimizer(recipe.optimizer)
    groups = f", parameter groups: {len(optimizer.groups)}" if optimizer.groups else ""
    rate = f"{recipe.optimizer['name']} lr {optimizer.lr:g}"
    losses = " + ".join(loss.kind for loss in recipe.list_losses())
    print_item(f"{path}: {shape}, {losses}, {rate}{groups}")


def print_written(path: Path, size: int) -> None:
    """Print the path and size of a file that was written."""
    print_item(f"{path}: {format_bytes(size)}")


def summarize_export(export: Export) -> dict[str, Any]:
    """Return the fields of an export as a dictionary, together with the total size."""
    import msgspec

    return {**msgspec.to_builtins(export), "total_bytes": export.total_bytes}


def print_export(export: Export) -> None:
    """Print the size of each exported graph, and the oldest ONNX Runtime that can run them all."""
    table = make_table("graph")
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
    print_item(table)
    names = {(kernel.domain, kernel.operator) for kernel in export.kernels}
    print_item(
        f"{len(names)} operators, all in ONNX Runtime {export.oldest_runtime} or newer: "
        "onnxruntime-android, onnxruntime-c and -objc, onnxruntime-react-native; for a build with "
        "no others see required_operators.config"
    )
    print_item(f"{export.path}: converted by {export.converter}")


def print_outputs(path: Path, outputs: Mapping[str, np.ndarray]) -> None:
    """Print the path of the output file, and the name, dtype and shape of each array in it."""
    from splitonnx.tensors import describe

    arrays = ", ".join(f"{name} {describe(array)}" for name, array in outputs.items())
    print_item(f"{path}: {arrays}")


def print_output_files(folder: Path, count: int) -> None:
    """Print the path of a folder of outputs, and the number of files in it."""
    print_item(f"{folder}: {count:,} {'file' if count == 1 else 'files'}")


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
        **({"wire": verification.wire} if verification.wire else {}),
    }


def print_verification(verification: Verification) -> None:
    """Print a table that compares the losses after each step, and then the verdict."""
    table = make_table()
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
    print_item(table)
    verdict = "[green]equal[/]" if verification.ok else "[red]not equal[/]"
    largest, rtol = verification.largest_difference, verification.rtol
    print_item(
        f"{verdict}: largest relative difference {largest:.2g}, allowed {rtol:g}", markup=True
    )
    if verification.wire:
        print_item(
            f"--wire {verification.wire} rounds what crosses the cut, which --rtol must allow"
        )


def make_table(*headings: str) -> Table:
    """Return an empty table with left-aligned columns, in the style of all commands."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def open_console(file: TextIO) -> Console:
    """Return a console that writes to ``file``, as wide as its terminal, or 160 columns."""
    from rich.console import Console

    # A pipe has no width, and a log that is cut at 80 columns would lose information.
    return Console(file=file, width=None if file.isatty() else 160, highlight=False)


def print_item(item: Table | str, *, markup: bool = False) -> None:
    """Print a table or a line of text to stdout; ``markup`` means that it contains styles."""
    open_console(sys.stdout).print(item, markup=markup, soft_wrap=isinstance(item, str))


def print_remark(sentence: str) -> None:
    """Print a remark to stderr as one line."""
    print(f"remark: {escape(sentence)}", file=sys.stderr)
