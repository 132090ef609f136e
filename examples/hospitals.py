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
import time
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

CHANNELS = (1, 16, 32)
"""Channels of the digits' images, and of what the two convolutions make of them."""
MOMENTUM = 0.9

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long everybody trains on some data, and which classes each hospital has.

    Each hospital makes ``steps`` steps.  ``local_steps`` are those between two averages, and
    ``turn_steps`` those of a turn; joint steps are averaged one by one.  ``favourites`` are each
    hospital's own classes, and ``strays`` says how much rarer the others are there.  The model is
    cut at the tensors ``at``.
    """

    steps: int
    local_steps: int
    turn_steps: int
    favourites: Sequence[Sequence[int]]
    strays: float
    rate: float
    at: tuple[str, str] = ("active0", "active2")

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
        steps=240,
        local_steps=2,
        turn_steps=8,
        favourites=((0,), (0, 1), (1,)),
        strays=0.1,
        rate=0.03,
    ),
    "digits": Plan(
        steps=504,
        local_steps=3,
        turn_steps=6,
        favourites=((0, 1, 2, 3), (3, 4, 5, 6), (6, 7, 8, 9)),
        strays=0.0,
        rate=0.02,
    ),
}


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all samples and their classes.

    Each measurement of a tumour has mean 0 and deviation 1, and a pixel is between 0 and 1.
    """
    found = load_breast_cancer() if name == "cancer" else load_digits()
    samples = found.data.astype(np.float32)
    if name == "digits":
        return samples / 16, found.target
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


class Builder:
    """An ONNX model that grows layer by layer; most end in ``active`` and a number.

    ``tensor`` is the newest tensor.
    """

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.tensor = "measurements"
        self._layers = 0

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Sequence[int]) -> None:
        """Append a node that reads the newest tensor."""
        name = name or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [self.tensor, *inputs], [name]))
        self.nodes[-1].attribute.extend(
            helper.make_attribute(key, values) for key, values in attributes.items()
        )
        self.tensor = name

    def add_layer(
        self, kind: str, shape: tuple[int, ...], *, name: str, **more: Sequence[int]
    ) -> None:
        """Append a layer with a weight of a shape, and a bias; without a name, end it in a Relu."""
        number, width = self._layers, shape[0] if kind == "Conv" else shape[1]
        scale = (2 / (np.prod(shape) / width)) ** 0.5
        drawn = self._random.normal(0, scale, shape).astype(np.float32)
        names = [f"layer{number}.{part}" for part in ("weight", "bias")]
        arrays = (drawn, np.zeros(width, np.float32))
        self.weights += [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
        self.add(kind, *names, name=name, **more)
        self._layers += 1
        if not name:
            self.add("Relu", name=f"active{number}")

    def finish(self, inputs: int, classes: int) -> onnx.ModelProto:
        """Return the model, which has one score a class."""
        graph = helper.make_graph(
            self.nodes, "hospitals",
            [helper.make_tensor_value_info("measurements", TensorProto.FLOAT, ["N", inputs])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", classes])],
            self.weights,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def build_perceptron(inputs: int, classes: int, random: np.random.Generator) -> onnx.ModelProto:
    """Build a perceptron of four layers: the head, two of the server's, and the tail."""
    builder = Builder(random)
    for shape in pairwise((inputs, HIDDEN[0], HIDDEN[0], HIDDEN[1])):
        builder.add_layer("Gemm", shape, name="")
    builder.add_layer("Gemm", (HIDDEN[1], classes), name="scores")
    return builder.finish(inputs, classes)


def build_convolutions(inputs: int, classes: int, random: np.random.Generator) -> onnx.ModelProto:
    """Build two convolutions and two full layers: the head, two of the server's, and the tail."""
    builder, side = Builder(random), int(inputs**0.5)
    builder.weights.append(numpy_helper.from_array(np.array([0, 1, side, side]), "image"))
    builder.add("Reshape", "image")
    for before, after in pairwise(CHANNELS):
        builder.add_layer("Conv", (after, before, 3, 3), name="", pads=[1, 1, 1, 1])
    builder.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    builder.add("Flatten")
    builder.add_layer("Gemm", (CHANNELS[-1] * (side // 2) ** 2, HIDDEN[0]), name="")
    builder.add_layer("Gemm", (HIDDEN[0], classes), name="scores")
    return builder.finish(inputs, classes)


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
    log = folder.with_suffix(".log")
    with log.open("w") as lines, subprocess.Popen(words, stderr=lines) as process:
        while (found := re.search(r"wss?://[^\s,]+", log.read_text())) is None:
            if process.poll() is not None:
                sys.exit(f"the server did not start: {log.read_text()}")
            time.sleep(0.1)
        try:
            yield found.group()
        finally:
            process.terminate()


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
        build = build_perceptron if name == "cancer" else build_convolutions
        onnx.save(build(samples.shape[1], int(labels.max()) + 1, random), self.model)

    def train_whole(self, data: str) -> float:
        """Train the uncut model on one file, and return its accuracy on the data held out."""
        return read_accuracy(
            call("train", self.model, "--local", *self._list_settings(data), "--optimizer", "sgd",
                 "--lr", self.plan.rate, "--momentum", MOMENTUM)
        )  # fmt: skip

    def train_together(self, policy: str) -> float:
        """Train three hospitals with one server, and return the accuracy of the joint model."""
        made = self.folder / policy
        at, tail_at = self.plan.at
        call("cut", self.model, "--at", at, "--tail-at", tail_at, "--optimizer", "sgd",
             "--lr", self.plan.rate, "--momentum", MOMENTUM, "-o", made, "--force")  # fmt: skip
        homes = [made / f"hospital{number}" for number in range(HOSPITALS)]
        for home in homes:
            shutil.copytree(made / "client", home)
        with (
            serve(made / "server", self.plan.list_options(policy)) as address,
            ExitStack() as stack,
        ):
            clients = [
                stack.enter_context(self._start_client(home, number, address))
                for number, home in enumerate(homes)
            ]
        printed = [home.with_suffix(".json").read_text() for home in homes]
        if any(client.returncode for client in clients):
            sys.exit(f"a hospital could not train with {policy}")
        reached = {read_accuracy(lines) for lines in printed}
        if len(reached) > 1:
            sys.exit(f"the hospitals have several models after {policy}: {reached}")
        return reached.pop()

    @contextmanager
    def _start_client(
        self, home: Path, number: int, address: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Start a hospital; leaving the context waits for its end.

        It prints into a file, as a pipe that nobody reads would stop it.
        """
        words = [
            str(SPLITONNX), "train", home, "--server", address, "--share",
            "--checkpoint-every", 0, *self._list_settings(f"hospital{number}"),
        ]  # fmt: skip
        with (
            home.with_suffix(".json").open("w") as lines,
            subprocess.Popen([*map(str, words)], stdout=lines) as process,
        ):
            yield process

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
