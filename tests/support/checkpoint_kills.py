"""Kill a process that writes a checkpoint, in each state that its system calls leave behind.

    python -m tests.support.checkpoint_kills FOLDER SCENARIO

leaves a folder for each kill that holds what the process left, as ``folder_states`` names them.
``trace.json`` lists the stops, before and after each system call, of the run that was not killed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from splitonnx.manifests import FORMAT, PartyManifest, Role, StateSpec
from splitonnx.runtime.storage.checkpoints import Checkpoint, CheckpointStore
from splitonnx.states import State, write_state
from splitonnx.tensors import TensorSpec
from tests.support.folder_states import kill_in_each_state

SESSION, OTHER = "0123456789abcdef" * 2, "f" * 32
SIZE = 5_000  # elements of a tensor: more bytes than a file's buffer takes
MANIFEST = PartyManifest(
    format=FORMAT,
    party="client",
    digest="d1" * 32,
    target="portable",
    phases=(),
    state=tuple(
        StateSpec(tensor=TensorSpec(name=name, dtype="F32", shape=(SIZE,)), role=Role.PARAMETER)
        for name in ("W1", "W2", "W3")
    ),
    files={},
    learning_rate=0.1,
)


def make_checkpoint(step: int) -> Checkpoint:
    generator = np.random.default_rng(step)
    tensors = {
        spec.tensor.name: generator.standard_normal(SIZE).astype(np.float32)
        for spec in MANIFEST.state
    }
    return Checkpoint(session=SESSION, step=step, tensors=tensors)


def open_store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, MANIFEST, SESSION)


def _write_straight(folder: Path) -> None:
    """Write as one should not, so that the test shows that it would notice."""
    place = folder / "sessions" / SESSION
    content = (place / "10.safetensors").read_bytes()
    with (place / "20.safetensors").open("wb", buffering=0) as file:
        file.write(content[:100])
        file.write(content[100:])


def write_outcome(folder: Path, session: str, step: int) -> None:
    state = State(tensors=make_checkpoint(step).tensors, step=step, session=session)
    write_state(folder, state, MANIFEST.digest)


NEW = make_checkpoint(30)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What stands in a folder before, in the order in which it was written, and what is killed."""

    act: Callable[[Path], None]
    steps: tuple[int, ...] = ()
    outcomes: tuple[tuple[str, int], ...] = ()  # session, step


SCENARIOS = {
    "first": Scenario(act=lambda folder: open_store(folder).write(NEW)),
    "third": Scenario(steps=(10, 20), act=lambda folder: open_store(folder).write(NEW)),
    "again": Scenario(steps=(20, 30), act=lambda folder: open_store(folder).write(NEW)),
    "stopped": Scenario(steps=(10, 20), act=lambda folder: open_store(folder).write_stopped(NEW)),
    "careless": Scenario(steps=(10, 20), act=_write_straight),
    "outcome": Scenario(
        outcomes=((OTHER, 10), (SESSION, 20)), act=lambda folder: write_outcome(folder, OTHER, 30)
    ),
}


def run(folder: Path, scenario: str) -> None:
    plan = SCENARIOS[scenario]
    before = folder / "before"
    before.mkdir()
    for step in plan.steps:
        open_store(before).write(make_checkpoint(step))
    for session, step in plan.outcomes:
        write_outcome(before, session, step)
    stops = kill_in_each_state(folder, lambda place: shutil.copytree(before, place), plan.act)
    (folder / "trace.json").write_bytes(msgspec.json.encode(stops))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
