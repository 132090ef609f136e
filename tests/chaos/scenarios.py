"""What is trained in chaos: small networks with Dropout and BatchNormalization on both sides.

It knows the commands and the folders that they work on; who runs them, and how often, it does not.
Where several clients train one model, each has data of its own, and more of them than the one
before, so that the averages are weighted.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.names import ASYNCHRONOUS, PER_CLIENT, SEQUENTIAL, SPLITFED_V2, SYNCHRONOUS
from splitonnx.optimizers import AdamW
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.partitions import cut
from splitonnx.sharing import list_joined
from splitonnx.wire_codecs import read_wire
from tests.support.zoo import ZOO

SAMPLES, BATCH = 250, 16
"""Sixteen steps an epoch, the last of them smaller."""
STEPS_AN_EPOCH = -(-SAMPLES // BATCH)
HELD_OUT = 20
"""Samples."""
EVERY = 10
"""Steps from one checkpoint to the next."""
LEAST_SAMPLES, MORE_SAMPLES = 90, 7
"""Samples of the first of several clients, and how many more each further one has."""
LOCAL_STEPS = 2
"""Steps of a round of several clients; some checkpoints lie inside a round."""
EVERY_TOGETHER = 3
"""Steps from one checkpoint to the next of several clients, besides those at the ends of rounds."""
ASTRAY = 0.5
"""How far faults may lead a training astray whose outcome depends on who comes first, as a part of
how far it moves without them."""
PATIENCE = 100_000
"""Seconds that a round waits for its clients: for all of them, however often they are killed."""
SEED = 3
"""Of shuffling and Dropout: any but the default."""
STATE = "state.safetensors"
OUTCOMES = "outcomes"
ROUNDS = "rounds"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A way to cut the network; both parts hold BatchNormalization and a Dropout that is on.

    With another ``policy`` than ``per-client``, ``clients`` train one model together.  ``wire`` are
    the codecs of what crosses the cut, and each step has ``micro_batches``, some of them in flight
    at once.
    """

    name: str
    at: str
    tail_at: tuple[str, ...] = ()
    clip_norm: float | None = None
    clients: int = 1
    policy: str = PER_CLIENT
    wire: str = "fp32"
    micro_batches: int = 1

    @property
    def joins(self) -> bool:
        """Whether the clients train one model together."""
        return self.policy != PER_CLIENT

    @property
    def is_deterministic(self) -> bool:
        """Whether a training through faults ends with the same bits as one without."""
        return self.policy not in (SEQUENTIAL, SPLITFED_V2, ASYNCHRONOUS)

    @property
    def local_steps(self) -> int:
        """Steps of a round."""
        return 1 if self.policy == SYNCHRONOUS else LOCAL_STEPS

    def count_rounds(self, steps: int) -> int:
        """How many rounds the server asks for; 0 if each client trains all its epochs."""
        if self.policy == ASYNCHRONOUS:
            return 0
        turns = self.clients if self.policy == SEQUENTIAL else 1
        return turns * steps // self.local_steps

    def count_epochs(self, number: int, steps: int) -> int:
        """How many epochs a client needs for its steps.

        Where clients take turns, there are some to spare: one that is killed may make a turn that
        is not counted, and would leave before the last round.
        """
        spare = steps // 2 if self.policy == SEQUENTIAL else 0
        return math.ceil((steps + spare) / math.ceil(self.count_samples(number) / BATCH))

    def count_made(self, number: int, steps: int) -> int | None:
        """How many steps a client makes in all; without rounds, its last epoch is whole.

        It is not known where clients take turns, as one that is killed may make a turn again.
        """
        if self.policy == SEQUENTIAL:
            return None
        if self.policy != ASYNCHRONOUS:
            return steps
        return self.count_epochs(number, steps) * math.ceil(self.count_samples(number) / BATCH)

    @property
    def names(self) -> tuple[str, ...]:
        """The clients' names, which are those of their folders."""
        if self.joins:
            return tuple(f"client-{number}" for number in range(self.clients))
        return ("client",)

    def count_samples(self, number: int) -> int:
        """How many samples a client trains with."""
        return LEAST_SAMPLES + MORE_SAMPLES * number if self.joins else SAMPLES

    def round_up(self, steps: int) -> int:
        """The least number of steps of a client, not below ``steps``, after which training ends."""
        unit = LOCAL_STEPS if self.joins else STEPS_AN_EPOCH
        return -(-steps // unit) * unit


SCENARIOS = (
    Scenario(name="vanilla", at="d1"),
    Scenario(name="u-shaped", at="r1", tail_at=("flat",), clip_norm=1.0),
)


def prepare(scenario: Scenario, folder: Path) -> None:
    """Write the bundle and the data into ``folder``."""
    entry = ZOO["dropout"]
    optimizer = AdamW(lr=1e-3, clip_norm=scenario.clip_norm)
    plain = cut(entry.build(), at=scenario.at, tail_at=scenario.tail_at, optimizer=optimizer)
    bundle = encode_crossings(plain, read_wire(scenario.wire))
    bundle.save(folder / "bundle")
    for number, name in enumerate(scenario.names):
        seeds = {"seed": 100 + number} if scenario.joins else {}
        _write_arrays(folder / f"{name}.npz", entry.data(scenario.count_samples(number), **seeds))
    _write_arrays(folder / "test.npz", entry.data(HELD_OUT, seed=8))


def copy_bundle(scenario: Scenario, folder: Path, name: str) -> Path:
    """Copy the untrained bundle for one run, the client's part for each; return the copy."""
    bundle = Path(shutil.copytree(folder / "bundle", folder / name))
    if scenario.joins:
        for client in scenario.names:
            shutil.copytree(bundle / "client", bundle / client)
    return bundle


def serve_command(scenario: Scenario, bundle: Path, steps: int) -> list[str]:
    """The server's command line; it tells its address on stderr.  ``steps`` are a client's."""
    joining = [
        "--policy", scenario.policy, "--clients-min", str(scenario.clients),
        "--local-steps", str(scenario.local_steps), "--rounds", str(scenario.count_rounds(steps)),
        "--round-timeout", str(PATIENCE),
    ]  # fmt: skip
    if scenario.policy not in (SEQUENTIAL, ASYNCHRONOUS):
        joining += ["--quorum", str(scenario.clients)]
    return [
        *_splitonnx("serve"), str(bundle / "server"), "--resume", "--port", "0", "--threads", "1",
        *(joining if scenario.joins else ()),
    ]  # fmt: skip


def train_command(scenario: Scenario, bundle: Path, name: str, port: int, steps: int) -> list[str]:
    """A client's command line; it prints a line of JSON a step."""
    folder = bundle.parent
    epochs = scenario.count_epochs(scenario.names.index(name), steps)
    return [
        *_splitonnx("train"), str(bundle / name), "--resume", "--json", "--threads", "1",
        "--server", f"ws://127.0.0.1:{port}",
        "--checkpoint-every", str(EVERY_TOGETHER if scenario.joins else EVERY),
        "--data", str(folder / f"{name}.npz"), "--eval-data", str(folder / "test.npz"),
        "--epochs", str(epochs),
        "--batch-size", str(BATCH), "--seed", str(SEED),
        "--micro-batches", str(scenario.micro_batches),
        *(["--share"] if scenario.joins else ()),
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


def compare(scenario: Scenario, left: Path, right: Path, steps: int) -> list[str]:
    """Say in what two trained bundles differ; nothing where every bit of all parties is equal.

    The server's outcomes are found by the sessions of the clients that trained them.  Where the
    order in which clients come decides, see :func:`_compare_loosely`.
    """
    if not scenario.is_deterministic:
        return _compare_loosely(scenario, left, right, steps)
    differences = []
    for name in scenario.names:
        one, other = (_read_state(bundle / name / STATE) for bundle in (left, right))
        differences += _compare_states(name, one, other, steps)
        one, other = (
            _find_outcome(bundle / "server", state.session)
            for bundle, state in ((left, one), (right, other))
        )
        differences += _compare_states(f"server, of {name}", one, other, steps)
    if scenario.joins:
        differences += _compare_rounds(left, right, scenario.count_rounds(steps))
    return differences


def _compare_loosely(scenario: Scenario, left: Path, right: Path, steps: int) -> list[str]:
    """Say where clients made other steps than planned, do not share a model, or learned otherwise.

    The rule: all clients of a training end with the same joined tensors, and the distance between
    two trainings is at most ``ASTRAY`` of how far the one without faults moved.
    """
    manifest = PartyBundle.load(left / "client").manifest
    joined = list_joined(manifest)
    start = PartyBundle.load(left / "client").state()
    ends, findings = [], []
    for bundle in (left, right):
        states = [PartyBundle.load(bundle / name) for name in scenario.names]
        for number, state in enumerate(states):
            made = scenario.count_made(number, steps)
            if made not in (None, state.step):
                findings.append(f"client {number} made {state.step} steps, expected {made}")
            findings += [
                f"client {number} ends with another '{name}'"
                for name in joined
                if not np.array_equal(state.state()[name], states[0].state()[name])
            ]
        ends.append(states[0].state())
    apart, moved = (
        math.sqrt(sum(float(((one[n] - other[n]) ** 2).sum()) for n in joined))
        for one, other in ((ends[0], ends[1]), (ends[0], start))
    )
    if not apart <= ASTRAY * moved:
        findings.append(f"it ends {apart:.3g} from the training without faults: {moved:.3g} moved")
    return findings


def _compare_states(name: str, one: _State, other: _State, steps: int) -> list[str]:
    differences = []
    if one.step != steps or other.step != steps:
        differences.append(f"{name}: {one.step} and {other.step} steps, expected {steps}")
    return differences + [
        f"{name}: '{key}' differs"
        for key in sorted({*one.tensors, *other.tensors})
        if one.tensors.get(key) != other.tensors.get(key)
    ]


def _compare_rounds(left: Path, right: Path, rounds: int) -> list[str]:
    """Compare the records of the last round: the joined tensors, and their number."""
    path = Path("server", ROUNDS, f"{rounds}.safetensors")
    if missing := [str(bundle / path) for bundle in (left, right) if not (bundle / path).exists()]:
        return [f"there is no {name}" for name in missing]
    one, other = (_read_tensors(bundle / path)[1] for bundle in (left, right))
    return [
        f"round {rounds}: '{key}' differs"
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    ]


@dataclass(frozen=True, kw_only=True)
class _State:
    session: str
    step: int
    tensors: dict[str, bytes]


def _find_outcome(folder: Path, session: str) -> _State:
    """Read a session's outcome: the server's newest state, or one that a later one replaced."""
    newest = _read_state(folder / STATE)
    if newest.session == session:
        return newest
    return _read_state(folder / OUTCOMES / f"{session}.safetensors")


def _read_state(path: Path) -> _State:
    metadata, tensors = _read_tensors(path)
    return _State(session=metadata["session"], step=int(metadata["step"]), tensors=tensors)


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Read a file's metadata and each tensor's bytes, without splitonnx's own reader."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    metadata = header.pop("__metadata__")
    data = content[8 + size :]
    return metadata, {
        name: json.dumps([entry["dtype"], entry["shape"]]).encode()
        + data[slice(*entry["data_offsets"])]
        for name, entry in header.items()
    }


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def _splitonnx(command: str) -> list[str]:
    return [sys.executable, "-m", "splitonnx", command]
