"""Run by the tests in an environment with stock onnxruntime alone: train bundles, keep the result.

    python portable_training.py [--batch=SAMPLES] [--provider=NAME] FOLDER...

Each FOLDER holds a bundle and data.npz; trained.npz with the losses and all parameters is written
beside them, and with another provider than the CPU placement.json, which says what that left to it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.builds.installed import installed_runtime
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory

BATCH = 8


def train(folder: Path, size: int, provider: str) -> None:
    """Train one bundle over all its data, batch by batch, and save what came out."""
    engine = Engine(threads=1, provider=provider)
    server = Executor(PartyBundle.load(folder / "bundle" / "server"), engine)
    data = dict(np.load(folder / "data.npz"))
    samples = len(data["labels"])
    losses = []
    link = connect_in_memory(server)
    part = folder / "bundle" / "client"
    with Client(part, link, threads=1, provider=provider, trusted=True) as client:
        for start in range(0, samples, size):
            batch = {name: array[start : start + size] for name, array in data.items()}
            losses.append(client.step(batch)["loss"])
        link.drain()
        trained: dict[str, Any] = {**link.executor.state(), **client.state()}
        np.savez(folder / "trained.npz", **trained | {"#losses": np.array(losses)})
        found = [p for p in (client.placement, engine.describe_placement()) if p is not None]
    if found:
        stages = [stage for placement in found for stage in placement.summarize()["stages"]]
        (folder / "placement.json").write_text(json.dumps(stages))


def read_option(name: str, default: str) -> str:
    """Read the last option of this name from the command line."""
    given = [word.partition("=")[2] for word in sys.argv if word.startswith(f"--{name}=")]
    return [default, *given][-1]


if __name__ == "__main__":
    assert importlib.util.find_spec("onnx") is None, "onnx is installed"
    assert not installed_runtime().training, "the training wheel is installed"
    batch, chosen = int(read_option("batch", str(BATCH))), read_option("provider", "cpu")
    for argument in sys.argv[1:]:
        if not argument.startswith("--"):
            train(Path(argument), batch, chosen)
