"""What is trained in chaos: small networks with Dropout and BatchNormalization on both sides.

It knows the commands and the folders that they work on; who runs them, and how often, it does not.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from splitonnx.optimizers import AdamW
from splitonnx.partitioner.partitions import cut
from tests.support.zoo import ZOO

SAMPLES, BATCH = 250, 16
"""Sixteen steps an epoch, the last of them smaller."""
STEPS_AN_EPOCH = -(-SAMPLES // BATCH)
HELD_OUT = 20
"""Samples."""
EVERY = 10
"""Steps from one checkpoint to the next."""
SEED = 3
"""Of shuffling and Dropout: any but the default."""
PARTIES = ("client", "server")
STATE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A way to cut the network; both parts hold BatchNormalization and a Dropout that is on."""

    name: str
    at: str
    tail_at: tuple[str, ...] = ()
    clip_norm: float | None = None


SCENARIOS = (
    Scenario(name="vanilla", at="d1"),
    Scenario(name="u-shaped", at="r1", tail_at=("flat",), clip_norm=1.0),
)


def prepare(scenario: Scenario, folder: Path) -> None:
    """Write the bundle and the data into ``folder``."""
    entry = ZOO["dropout"]
    optimizer = AdamW(lr=1e-3, clip_norm=scenario.clip_norm)
    bundle = cut(entry.build(), at=scenario.at, tail_at=scenario.tail_at, optimizer=optimizer)
    bundle.save(folder / "bundle")
    _write_arrays(folder / "train.npz", entry.data(SAMPLES))
    _write_arrays(folder / "test.npz", entry.data(HELD_OUT, seed=8))


def copy_bundle(folder: Path, name: str) -> Path:
    """Copy the untrained bundle for one run, and return the copy."""
    return Path(shutil.copytree(folder / "bundle", folder / name))


def serve_command(bundle: Path) -> list[str]:
    """The server's command line; it tells its address on stderr."""
    return [
        *_splitonnx("serve"), str(bundle / "server"), "--resume", "--port", "0", "--threads", "1",
    ]  # fmt: skip


def train_command(bundle: Path, port: int, epochs: int) -> list[str]:
    """The client's command line; it prints a line of JSON a step."""
    folder = bundle.parent
    return [
        *_splitonnx("train"), str(bundle / "client"), "--resume", "--json", "--threads", "1",
        "--server", f"ws://127.0.0.1:{port}", "--checkpoint-every", str(EVERY),
        "--data", str(folder / "train.npz"), "--eval-data", str(folder / "test.npz"),
        "--epochs", str(epochs), "--batch-size", str(BATCH), "--seed", str(SEED),
    ]  # fmt: skip


def read_port(line: str) -> int | None:
    """Find the port in what the server says, if it says it."""
    _, found, rest = line.partition("ws://127.0.0.1:")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return int(digits) if found and digits else None


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step as the client tells it; ``loss`` as it was printed, to the last digit."""

    step: int
    loss: float
    bytes_up: int
    bytes_down: int


def read_step(line: str) -> Step | None:
    """Find a step in what the client says; a line that a kill cut short says nothing."""
    if not (line.startswith('{"step"') and line.endswith("}\n")):
        return None
    record = json.loads(line)
    return Step(**{field.name: record[field.name] for field in fields(Step)})


def compare(left: Path, right: Path, steps: int) -> list[str]:
    """Say in what two trained bundles differ; nothing where every bit of both parties is equal."""
    differences = []
    for party in PARTIES:
        one, other = (_read_state(bundle / party / STATE) for bundle in (left, right))
        if one[0] != steps or other[0] != steps:
            differences.append(f"{party}: {one[0]} and {other[0]} steps, expected {steps}")
        differences += [
            f"{party}: '{name}' differs"
            for name in sorted({*one[1], *other[1]})
            if one[1].get(name) != other[1].get(name)
        ]
    return differences


def _read_state(path: Path) -> tuple[int, dict[str, bytes]]:
    """Read a state's step and each tensor's bytes, without splitonnx's own reader."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    step = int(header.pop("__metadata__")["step"])
    data = content[8 + size :]
    return step, {
        name: json.dumps([entry["dtype"], entry["shape"]]).encode()
        + data[slice(*entry["data_offsets"])]
        for name, entry in header.items()
    }


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def _splitonnx(command: str) -> list[str]:
    return [sys.executable, "-m", "splitonnx", command]
