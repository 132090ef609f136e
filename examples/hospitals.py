"""Three hospitals train one model, and none of them shows its patients to anybody.

    python examples/hospitals.py [FOLDER [DATA]]

DATA is ``cancer``, scikit-learn's 569 breast tumours with 30 measurements each, or ``digits``, its
1,797 handwritten digits.  Each hospital holds other classes more often than the others do: one sees
mostly malignant tumours, or mostly the digits 0 to 3.  The network is cut in a U-shape, so that
neither measurements nor labels leave a hospital.  Each policy of the server that joins clients is
tried by four processes: a server and three hospitals.  For comparison, each hospital trains alone,
and one training has all data.  Accuracies are of data that no hospital trained
with.  Everything is written into FOLDER, ``hospitals-output`` by default.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_digits

SPLITONNX = Path(sysconfig.get_path("scripts")) / "splitonnx"
HOSPITALS = 3
BATCH = 16
HELD_OUT = 0.25
"""The part of all samples that no hospital trains with."""
HIDDEN = (64, 32)
"""Widths of the layers that the client's head and the server end with."""

RATE, MOMENTUM = 0.03, 0.9

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long everybody trains on some data, and which classes each hospital has.

    Each hospital makes ``steps`` steps.  ``local_steps`` are those between two averages, and
    ``turn_steps`` those of a turn; joint steps are averaged one by one.
    ``favourites`` are each hospital's own classes, and ``strays``
    says how much rarer the others are there.
    """

    steps: int
    local_steps: int
    turn_steps: int
    favourites: Sequence[Sequence[int]]
    strays: float

    def list_options(self, policy: str) -> list[object]:
        """Return the server's options for a policy, with which all hospitals make their steps."""
        steps = {"sequential": self.turn_steps, "synchronous": 1}.get(policy, self.local_steps)
        turns = HOSPITALS if policy in ("sequential", "asynchronous") else 1
        return [
            "--policy", policy, "--clients-min", HOSPITALS, "--local-steps", steps,
            "--rounds", turns * self.steps // steps,
        ]  # fmt: skip


PLANS: Mapping[str, Plan] = {
    "cancer": Plan(
        steps=240, local_steps=2, turn_steps=8, favourites=((0,), (0, 1), (1,)), strays=0.1
    ),
    "digits": Plan(
        steps=900,
        local_steps=3,
        turn_steps=6,
        favourites=((0, 1, 2, 3), (3, 4, 5, 6), (6, 7, 8, 9)),
        strays=0.02,
    ),
}


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all samples, each measurement with mean 0 and deviation 1, and their classes."""
    found = load_breast_cancer() if name == "cancer" else load_digits()
    samples = found.data.astype(np.float32)
    spread = samples.std(axis=0)
    return (samples - samples.mean(axis=0)) / np.where(spread > 0, spread, 1), found.target


def divide(
    labels: np.ndarray, plan: Plan, random: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the samples of each hospital, and those that are held out."""
    order = random.permutation(len(labels))
    held_out, rest = np.split(order, [int(len(order) * HELD_OUT)])
    fits = np.array([[label in own for own in plan.favourites] for label in labels[rest]], float)
    chances = np.where(fits > 0, 1.0, plan.strays)
    chances /= chances.sum(axis=1, keepdims=True)
    owners = (random.random((len(rest), 1)) > chances.cumsum(axis=1)).sum(axis=1)
    return [rest[owners == number] for number in range(HOSPITALS)], held_out


def build_model(inputs: int, classes: int, random: np.random.Generator) -> onnx.ModelProto:
    """Build a perceptron of four layers: the head, two of the server's, and the tail."""
    widths = (inputs, HIDDEN[0], HIDDEN[0], HIDDEN[1], classes)
    nodes, weights, source = [], [], "measurements"
    for layer, (before, after) in enumerate(pairwise(widths)):
        weight = random.normal(0, (2 / before) ** 0.5, (before, after)).astype(np.float32)
        weights += [
            numpy_helper.from_array(weight, f"layer{layer}.weight"),
            numpy_helper.from_array(np.zeros(after, np.float32), f"layer{layer}.bias"),
        ]
        is_last = layer == len(widths) - 2
        target = "scores" if is_last else f"linear{layer}"
        names = [source, f"layer{layer}.weight", f"layer{layer}.bias"]
        nodes.append(helper.make_node("Gemm", names, [target]))
        if not is_last:
            source = f"active{layer}"
            nodes.append(helper.make_node("Relu", [target], [source]))
    graph = helper.make_graph(
        nodes, "hospitals",
        [helper.make_tensor_value_info("measurements", TensorProto.FLOAT, ["N", inputs])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", classes])],
        weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def call(*words: object) -> str:
    """Run one splitonnx command, and return what it printed; end the example if it fails."""
    done = subprocess.run(
        [str(SPLITONNX), *map(str, words)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def read_accuracy(lines: str) -> float:
    """Return the accuracy after the last epoch, of what ``train --json`` printed."""
    records = [json.loads(line) for line in lines.splitlines()]
    return float([r["metrics"]["accuracy"] for r in records if "accuracy" in r.get("metrics", {})
                  and "step" not in r][-1])  # fmt: skip


@contextmanager
def serve(folder: Path, options: Sequence[object]) -> Iterator[str]:
    """Serve a bundle's server part in a process of its own, and return its address."""
    words = [str(SPLITONNX), "serve", str(folder), "--port", "0", *map(str, options)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if (found := re.search(r"wss?://\S+", line)) is not None:
                break
        else:
            sys.exit(f"the server did not start: {' '.join(words)}")
        try:
            yield found.group()
        finally:
            process.terminate()
            process.stderr.read()


class Example:
    """The data, the cut model, and the trainings on them; all files are in ``folder``."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.plan = folder, PLANS[name]
        folder.mkdir(parents=True, exist_ok=True)
        samples, labels = load(name)
        random = np.random.default_rng(0)
        self.parts, held_out = divide(labels, self.plan, random)
        self.labels = labels
        everything = np.concatenate(self.parts)
        chosen = {"held_out": held_out, "pooled": everything}
        chosen |= {f"hospital{n}": part for n, part in enumerate(self.parts)}
        for file, rows in chosen.items():
            np.savez(folder / f"{file}.npz", measurements=samples[rows], labels=labels[rows])
        self.model = folder / "model.onnx"
        onnx.save(build_model(samples.shape[1], int(labels.max()) + 1, random), self.model)

    def train_whole(self, data: str) -> float:
        """Train the uncut model on one file, and return its accuracy on the data held out."""
        return read_accuracy(
            call("train", self.model, "--local", *self._list_settings(data), "--optimizer", "sgd",
                 "--lr", RATE, "--momentum", MOMENTUM)
        )  # fmt: skip

    def train_together(self, policy: str) -> float:
        """Train three hospitals with one server, and return the accuracy of the joint model."""
        made = self.folder / policy
        call("cut", self.model, "--at", "active0", "--tail-at", "active2", "--optimizer", "sgd",
             "--lr", RATE, "--momentum", MOMENTUM, "-o", made, "--force")  # fmt: skip
        homes = [made / f"hospital{number}" for number in range(HOSPITALS)]
        for home in homes:
            shutil.copytree(made / "client", home)
        with (
            serve(made / "server", self.plan.list_options(policy)) as address,
            ExitStack() as stack,
        ):
            clients = [
                stack.enter_context(subprocess.Popen(
                    [str(SPLITONNX), *map(str, (
                        "train", homes[number], "--server", address,
                        "--share", "--checkpoint-every", 0,
                        *self._list_settings(f"hospital{number}"),
                    ))],
                    stdout=subprocess.PIPE, text=True,
                ))
                for number in range(HOSPITALS)
            ]  # fmt: skip
            printed = [client.communicate()[0] for client in clients]
        if any(client.returncode for client in clients):
            sys.exit(f"a hospital could not train with {policy}")
        reached = {read_accuracy(lines) for lines in printed}
        if len(reached) > 1:
            sys.exit(f"the hospitals have several models after {policy}: {reached}")
        return reached.pop()

    def _list_settings(self, data: str) -> list[object]:
        """Return the options of ``train`` for a file; the rounds may end training earlier."""
        rows = len(np.load(self.folder / f"{data}.npz")["labels"])
        epochs = -(-self.plan.steps // -(-rows // BATCH))
        return [
            "--data", self.folder / f"{data}.npz", "--eval-data", self.folder / "held_out.npz",
            "--epochs", epochs, "--batch-size", BATCH, "--json",
        ]  # fmt: skip


def main() -> int:
    """Train by each policy, and print what everybody reaches."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "hospitals-output")
    name = sys.argv[2] if len(sys.argv) > 2 else "cancer"
    if name not in PLANS:
        sys.exit(f"there are no data '{name}'; take one of {', '.join(PLANS)}")
    example = Example(folder / name, name)
    table = Table("training", "accuracy on data held out")
    for number, part in enumerate(example.parts):
        shares = np.bincount(example.labels[part], minlength=example.labels.max() + 1)
        console.print(f"hospital {number} has {len(part)} samples; by class: {shares.tolist()}")
        table.add_row(f"hospital {number} alone", f"{example.train_whole(f'hospital{number}'):.1%}")
    for policy in ("sequential", "splitfed-v1", "splitfed-v2", "synchronous", "asynchronous"):
        table.add_row(f"all three, {policy}", f"{example.train_together(policy):.1%}")
    table.add_row("one training on all data", f"{example.train_whole('pooled'):.1%}")
    console.print(table)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
