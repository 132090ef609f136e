"""One network cut in several places on both targets, each beside its unsplit training.

The whole is trained once a target and the parts are compared with that; real networks are too
slow to train it anew for each place, as ``verify`` does.
"""

from __future__ import annotations

import hashlib
import pickle
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from filelock import FileLock

from splitonnx.bundles import Bundle
from splitonnx.manifests import Role
from splitonnx.names import BatchNormMode, Target
from splitonnx.optimizers import SGD, Optimizer
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from tests.support import portable_training

Arrays = Mapping[str, np.ndarray]
Kept = TypeVar("Kept")
Place = tuple[str, str | None]
"""Where the head ends, and where the tail begins if the cut is U-shaped."""

TARGETS: tuple[Target, ...] = ("training", "portable")
_SMALLEST = 1e-3
GENTLE = SGD(lr=1e-2, clip_norm=1.0)
"""Steps that move every network visibly and none away, whatever its depth."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with what is needed to train it; ``data`` holds a batch for every step."""

    model: onnx.ModelProto | bytes
    data: Arrays
    batch: int
    loss: str = "cross-entropy"
    output: str | None = None
    batchnorm: BatchNormMode | None = None
    optimizer: Optimizer = GENTLE

    @property
    def steps(self) -> int:
        """How many steps the data last for."""
        return len(next(iter(self.data.values()))) // self.batch

    def cut(self, at: str | None, tail: str | None, target: Target) -> Bundle:
        """Cut the model for one target."""
        return cut_prepared(
            self.prepared,
            at=at,
            tail_at=tail or (),
            loss=self.loss,
            output=self.output,
            optimizer=self.optimizer,
            client_target=target,
            server_target=target,
        )

    @cached_property
    def prepared(self) -> PreparedModel:
        """The model as every cut of it is made from."""
        return prepare(open_model(self.model), batchnorm=self.batchnorm)

    @cached_property
    def places(self) -> list[Place]:
        """The places that are found in the model."""
        return list_places(self.prepared)


def list_places(prepared: PreparedModel) -> list[Place]:
    """List a cut behind the first trained layer, one in the middle and a U-shaped one."""
    found = list_cuts(prepared, None)
    names = [cut.tensor for cut in found if cut.client_parameters and cut.server_parameters]
    first, middle, last = names[0], names[len(names) // 2], names[-1]
    return [(first, None), (middle, None), (first, last)]


@dataclass(frozen=True, kw_only=True)
class KeptSubject(Subject):
    """A subject whose places and bundles are kept in a folder, which several processes may share.

    Several tests ask for the same; the model is a small one.
    """

    folder: Path

    def cut(self, at: str | None, tail: str | None, target: Target) -> Bundle:
        """Cut the model for one target, or return the bundle that was cut before."""
        return self._keep(f"{at} {tail} {target}", partial(super().cut, at, tail, target))

    @cached_property
    def places(self) -> list[Place]:
        """The places of any subject, searched once."""
        return self._keep("places", lambda: list_places(self.prepared))

    def _keep(self, key: str, make: Callable[[], Kept]) -> Kept:
        file = self.folder / hashlib.sha256(key.encode()).hexdigest()
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                file.write_bytes(pickle.dumps(make()))
            kept: Kept = pickle.loads(file.read_bytes())
        return kept


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training gave: the loss of every step, and the state after the last."""

    losses: np.ndarray
    state: Arrays


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A place on a target; ``difference`` is the largest relative one of losses and state.

    ``unmoved`` names what training left as it was: where that is all, equality says nothing.
    """

    place: Place
    target: Target
    difference: float
    losses: np.ndarray
    unmoved: Collection[str]


def try_places(
    subject: Subject, places: Sequence[Place], targets: Sequence[Target] = TARGETS
) -> Iterator[Trial]:
    """Train the whole once a target, then every place, and compare."""
    for target in targets:
        whole = train(subject.cut(None, None, target), subject)
        assert np.isfinite(whole.losses).all()
        for place in places:
            bundle = subject.cut(*place, target)
            split = train(bundle, subject)
            yield Trial(
                place=place,
                target=target,
                difference=compare(split, whole),
                losses=split.losses,
                unmoved=find_unmoved(bundle, split),
            )


def train(bundle: Bundle, subject: Subject) -> Trained:
    """Train a bundle in this process over all of the subject's data, in order."""
    server = None if bundle.server is None else Executor(bundle.server, Engine(threads=1))
    link = None if server is None else connect_in_memory(server)
    kept = _list_kept(bundle)
    losses = []
    with Client(bundle.client, link, threads=1) as client:
        for step in range(subject.steps):
            piece = slice(step * subject.batch, (step + 1) * subject.batch)
            batch = {name: array[piece] for name, array in subject.data.items()}
            losses.append(float(client.step(batch)["loss"]))
        state = dict(client.state())
        if link is not None:
            link.drain()
            state |= link.executor.state()
    return Trained(
        losses=np.array(losses), state={n: a.copy() for n, a in state.items() if n in kept}
    )


def find_unmoved(bundle: Bundle, trained: Trained) -> list[str]:
    """Name the parameters and running statistics that are still the bundle's first ones."""
    first = {
        name: array for party in bundle.parties.values() for name, array in party.weights.items()
    }
    return [name for name, array in trained.state.items() if np.array_equal(array, first[name])]


def train_stock(
    python: Path, bundles: Mapping[Path, tuple[Bundle, Subject]]
) -> dict[Path, Trained]:
    """Train portable bundles, each in its folder, with the stock ONNX Runtime of ``python``."""
    batches: dict[int, list[Path]] = {}
    for folder, (bundle, subject) in bundles.items():
        data: dict[str, Any] = {**subject.data}
        bundle.save(folder / "bundle")
        np.savez(folder / "data.npz", **data)
        batches.setdefault(subject.batch, []).append(folder)
    script = Path(portable_training.__file__)
    for batch, folders in batches.items():
        command: list[str | Path] = [python, script, f"--batch={batch}", *folders]
        done = subprocess.run(
            command, cwd=script.parent, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return {folder: _read_trained(folder, bundle) for folder, (bundle, _) in bundles.items()}


def _read_trained(folder: Path, bundle: Bundle) -> Trained:
    kept = _list_kept(bundle)
    with np.load(folder / "trained.npz") as trained:
        state = {name: trained[name] for name in trained.files if name in kept}
        return Trained(losses=trained["#losses"], state=state)


def _list_kept(bundle: Bundle) -> set[str]:
    return {
        state.tensor.name
        for party in bundle.parties.values()
        for state in party.manifest.state
        if state.role in (Role.PARAMETER, Role.BUFFER)
    }


def compare(split: Trained, whole: Trained) -> float:
    """Return the largest difference of any tensor, relative to its largest value.

    The scale is at least 1e-3: a parameter may start at 0 and have no gradient but rounding, as
    the bias of an attention's keys, which Softmax cancels.
    """
    assert split.state.keys() == whole.state.keys()
    pairs = [(split.losses, whole.losses)]
    pairs += [(split.state[name], value) for name, value in whole.state.items()]
    return max(_relate(actual, expected) for actual, expected in pairs)


def _relate(actual: np.ndarray, expected: np.ndarray) -> float:
    difference = float(np.max(np.abs(np.subtract(actual, expected, dtype=np.float64)), initial=0))
    scale = float(np.max(np.abs(expected), initial=0))
    return difference / max(scale, _SMALLEST)
