"""The whole job on real data: cut a network, train it split, and get one model back.

    python examples/demo.py [FOLDER [EPOCHS]]

scikit-learn's 1,797 handwritten digits, trained U-shaped: client and server are two processes
linked by a websocket, and neither images nor labels leave the client.  Everything is done by the
``splitonnx`` command; all that it writes is in FOLDER, ``demo-output`` by default.  It trains for
EPOCHS, 12 by default.  Exit code 1 where the trained model is worse than promised or does not agree
with the split one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

SPLITONNX = Path(sysconfig.get_path("scripts")) / "splitonnx"
MODEL = Path(__file__).with_name("digits.onnx")
HEAD_ENDS, TAIL_BEGINS = "/block1/Relu_output_0", "/block3/MaxPool_1_output_0"
EPOCHS, BATCH, LEARNING_RATE = 12, 32, 1e-3
HELD_OUT = 360
"""Digits."""
WANTED_ACCURACY = 0.97
AGREEMENT = 1e-5
"""Between trained.onnx and the split model: difference of the outputs over the largest output."""

Word = str | Path | float
"""One word of a command line."""

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training's figures: medians over whole batches, the last evaluation's accuracy."""

    accuracy: float
    seconds: float
    bytes_up: float
    bytes_down: float

    @classmethod
    def read(cls, lines: str) -> Run:
        """Read what ``train --json`` printed: a line a step, and a line an evaluation."""
        records = [json.loads(line) for line in lines.splitlines()]
        steps = [record for record in records if record.get("samples") == BATCH]
        evaluations = [one for one in records if "metrics" in one and "samples" not in one]
        return cls(
            accuracy=evaluations[-1]["metrics"]["accuracy"],
            seconds=median(step["seconds"] for step in steps),
            bytes_up=median(step["bytes_up"] for step in steps),
            bytes_down=median(step["bytes_down"] for step in steps),
        )


def announce(arguments: Sequence[Word]) -> list[str]:
    """Show a command as a user would type it, and return it as it is run."""
    words = [os.path.relpath(word) if isinstance(word, Path) else str(word) for word in arguments]
    console.print(f"[bold cyan]$ splitonnx {' '.join(words)}[/]")
    return [str(SPLITONNX), *words]


def call(*arguments: Word, show: bool = True) -> str:
    """Run one splitonnx command and return what it printed; end the demo where it fails."""
    done = subprocess.run(announce(arguments), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"splitonnx {arguments[0]} failed with exit code {done.returncode}")
    printed: str = done.stdout
    for line in printed.splitlines() if show else ():
        if line.strip():
            console.print(f"  {line}", markup=False)
    return printed


@contextmanager
def serve(bundle: Path) -> Iterator[str]:
    """Serve a bundle in a process of its own, and yield its address."""
    command = announce(("serve", bundle, "--port", "0"))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        if "ws://" not in line:
            sys.exit(f"the server did not start: {line}")
        console.print(f"  {line.rstrip()}", markup=False)
        try:
            yield next(word.rstrip(",") for word in line.split() if word.startswith("ws://"))
        finally:
            process.terminate()
            process.communicate()


def write_digits(folder: Path) -> tuple[Path, Path]:
    """Write the digits as train.npz and test.npz: images F32 in [0, 1], labels I64."""
    digits = load_digits()
    images = (digits.images[:, np.newaxis] / 16).astype(np.float32)  # (N, 1, 8, 8)
    labels = digits.target.astype(np.int64)
    order = np.random.RandomState(0).permutation(len(labels))
    paths = folder / "train.npz", folder / "test.npz"
    for path, rows in zip(paths, (order[HELD_OUT:], order[:HELD_OUT]), strict=True):
        np.savez(path, image=images[rows], labels=labels[rows])
    console.print(f"{len(order) - HELD_OUT} handwritten digits to train on, {HELD_OUT} held out\n")
    return paths


def compare_outputs(model: Path, images: np.ndarray, predictions: np.ndarray) -> float:
    """Run a model in a plain session; return how far it is from ``predictions``, relatively."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images})
    return float(np.abs(logits - predictions).max() / np.abs(predictions).max())


def tabulate(split: Run, whole: Run) -> Table:
    """Set split and unsplit training side by side."""
    table = Table(title="the same training, split and unsplit", title_justify="left")
    for heading in ("", "held-out accuracy", "ms / step", "kB up / step", "kB down / step"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, run in (("split", split), ("unsplit", whole)):
        table.add_row(
            name,
            f"{run.accuracy:.2%}",
            f"{run.seconds * 1e3:.1f}",
            f"{run.bytes_up / 1e3:.1f}",
            f"{run.bytes_down / 1e3:.1f}",
        )
    return table


def main(folder: Path, epochs: int = EPOCHS) -> int:
    """Do it all and return the exit code."""
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    bundle, trained = folder / "bundle", folder / "trained.onnx"
    train, test = write_digits(folder)
    recipe = ("--loss", "cross-entropy", "--optimizer", "adamw", "--lr", LEARNING_RATE)
    schedule = ("--data", train, "--eval-data", test, "--epochs", epochs, "--batch-size", BATCH)

    call("inspect", MODEL, "--batch", BATCH)
    cut = ("--at", HEAD_ENDS, "--tail-at", TAIL_BEGINS, *recipe)
    call("cut", MODEL, *cut, "-o", bundle, "--force")
    call("verify", bundle, "--data", train, "--steps", 5)
    with serve(bundle / "server") as url:
        lines = call("train", bundle / "client", "--server", url, *schedule, "--json", show=False)
        split = Run.read(lines)
        predictions = folder / "predictions.npz"
        call(
            "predict", bundle / "client", "--server", url, "--data", test, "-o", predictions,
            "--force",
        )  # fmt: skip
    call("merge", bundle, "-o", trained, "--force")
    whole = Run.read(call("train", MODEL, "--local", *recipe, *schedule, "--json", show=False))

    difference = compare_outputs(trained, np.load(test)["image"], np.load(predictions)["logits"])
    console.print()
    console.print(tabulate(split, whole))
    console.print(
        f"{trained} in a plain InferenceSession differs from the split model by "
        f"{difference:.1e} (allowed {AGREEMENT:.0e})"
    )
    good = split.accuracy >= WANTED_ACCURACY and difference <= AGREEMENT
    verdict = "[bold green]good[/]" if good else "[bold red]not good[/]"
    console.print(
        f"{verdict}: {split.accuracy:.2%} of {HELD_OUT} held-out digits (wanted "
        f"{WANTED_ACCURACY:.0%}), in {time.perf_counter() - start:.0f} s altogether"
    )
    return 0 if good else 1


if __name__ == "__main__":
    wanted_folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
    wanted_epochs = int(sys.argv[2]) if len(sys.argv) > 2 else EPOCHS
    sys.exit(main(wanted_folder, wanted_epochs))
