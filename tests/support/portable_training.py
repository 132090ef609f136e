"""Run by the tests in an environment with stock onnxruntime alone: train bundles, keep the result.

    python portable_training.py [--batch=SAMPLES] FOLDER...

Each FOLDER holds a bundle and data.npz; trained.npz with the losses and all parameters is written
beside them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine, installed_runtime
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory

BATCH = 8


def train(folder: Path, size: int = BATCH) -> None:
    """Train one bundle over all its data, batch by batch, and save what came out."""
    server = Executor(PartyBundle.load(folder / "bundle" / "server"), Engine(threads=1))
    data = dict(np.load(folder / "data.npz"))
    samples = len(data["labels"])
    losses = []
    link = connect_in_memory(server)
    with Client(folder / "bundle" / "client", link, threads=1, trusted=True) as client:
        for start in range(0, samples, size):
            batch = {name: array[start : start + size] for name, array in data.items()}
            losses.append(client.step(batch)["loss"])
        link.drain()
        trained: dict[str, Any] = {**link.executor.state(), **client.state()}
        np.savez(folder / "trained.npz", **trained | {"#losses": np.array(losses)})


if __name__ == "__main__":
    assert importlib.util.find_spec("onnx") is None, "onnx is installed"
    assert not installed_runtime().training, "the training wheel is installed"
    sizes = [int(word.removeprefix("--batch=")) for word in sys.argv if word.startswith("--batch=")]
    for argument in sys.argv[1 + len(sizes) :]:
        train(Path(argument), *sizes)
