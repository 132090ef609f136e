"""A policy under which clients train one model, its clients by hand, and its failures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import (
    SplitonnxError,
    WorkerLost,
)
from splitonnx.messages import TaskKey
from splitonnx.names import ASYNCHRONOUS, PREDICT, SERVER, SPLITFED_V2, SYNCHRONOUS
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.joining.asynchronous import Asynchronous
from splitonnx.runtime.server.policies.joining.rounds import RoundRules, Rounds
from splitonnx.runtime.server.policies.model_makers import ModelMaker
from splitonnx.runtime.server.policies.models import ServerModel
from splitonnx.runtime.server.policies.shared_training import SharedTraining
from splitonnx.runtime.server.policies.steps.joint_batches import BatchLayout
from splitonnx.runtime.server.policies.steps.shared_steps import SharedSteps
from splitonnx.runtime.server.policies.tasks import Delivery, Joined, Task
from splitonnx.runtime.server.policies.terms import Terms
from splitonnx.runtime.storage.archives import Archive
from splitonnx.runtime.storage.round_records import RoundRecord
from splitonnx.sharing import name_joined
from tests.support.registries import ANN, BOB
from tests.support.shared_models import draw, step_task, tell
from tests.support.sharing import greet, share_task, sharing_bundle

EVE = "e" * 32
JOINED = name_joined("W1")
TIMEOUT = 5.0


class Mortal(Executor):
    """An executor that may be lost, as one in a worker process may.

    That it is dead may be noticed only when it is used.
    """

    is_dead = is_noticed = False

    @property
    def is_lost(self) -> bool:
        return self.is_noticed

    def advance(self, key: TaskKey) -> Iterator[dict[str, np.ndarray]]:
        self._require_life()
        return super().advance(key)

    def state(self) -> dict[str, np.ndarray]:
        self._require_life()
        return super().state()

    def _require_life(self) -> None:
        if self.is_dead:
            self.is_noticed = True
            raise WorkerLost("", "it was killed")


class Scene:
    """A server's policy, at the test's own time; what it records outlasts it."""

    def __init__(
        self, name: str = SPLITFED_V2, *, folder: Path | None = None, clients: int = 2
    ) -> None:
        self.bundle = sharing_bundle()
        self.name, self.folder, self.clients = name, folder, clients
        self.recorded: list[RoundRecord] = []
        self.refusal: SplitonnxError | None = None
        self.now = 0.0
        if folder is not None:
            self.bundle.parties[SERVER].save(folder)
        self.open(None)

    def open(self, newest: RoundRecord | None) -> None:
        """Start the server; one that ran before is gone without a word."""
        party = (
            self.bundle.parties[SERVER] if self.folder is None else PartyBundle.load(self.folder)
        )
        archive = None
        if self.folder is not None:
            archive = Archive(self.folder, party.manifest, most_bytes=None, keep_seconds=None)
        rules = RoundRules(clients_min=self.clients, timeout=TIMEOUT)
        rounds = Rounds(rules, newest)
        if self.name == ASYNCHRONOUS:
            rounds = Asynchronous(rules, newest, staleness=1)
        layout = BatchLayout(party.manifest) if self.name == SYNCHRONOUS else None
        self.policy = SharedTraining(
            ModelMaker(Mortal(party, Engine(threads=1)), archive, None),
            rounds,
            SharedSteps(layout=layout, timeout=TIMEOUT),
            terms=Terms(policy=self.name, local_steps=1),
            manifest=party.manifest,
            record=self.record,
            read_before=self.read_before,
            clock=lambda: self.now,
        )

    def record(self, joint: RoundRecord) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.recorded.append(joint)

    def read_before(self, number: int) -> RoundRecord | None:
        earlier = [joint for joint in self.recorded if joint.number < number]
        return earlier[-1] if earlier else None

    def restart(self) -> None:
        self.open(self.recorded[-1])

    def join(self, session: str, owner: str = "", **changes: object) -> Joined:
        hello = msgspec.structs.replace(greet(self.bundle, session), **changes)
        return self.policy.join(hello, owner, resume=True)

    def begin(self, *sessions: str) -> None:
        """Have clients join and receive the first round's tensors."""
        for session in sessions:
            self.join(session, session[0])
        for session in sessions:
            told = self.share(session, 0, 1.0)
        assert sorted(d.key.session for d in told) == sorted(sessions)

    def submit(self, task: Task) -> list[Delivery]:
        return list(self.policy.submit(task))

    def share(self, session: str, step: int, value: float, samples: int = 0) -> list[Delivery]:
        return self.submit(share_task(session, step, value, samples=samples))

    def train(self, session: str, step: int, seed: int | None = None) -> list[tuple[str, str]]:
        """Submit a step, the same each time, and tell what comes of it."""
        seed = step * 3 + ord(session[0]) if seed is None else seed
        return tell(self.submit(step_task(session, draw(seed), step=step)))

    def make_round(self, step: int) -> list[Delivery]:
        """Have Ann and Bob make the step and share; return what is delivered."""
        for session in (ANN, BOB):
            self.train(session, step)
        return [
            delivery
            for session, value in ((ANN, 0.1), (BOB, 0.7))
            for delivery in self.share(session, step + 1, value * step, samples=1 + step)
        ]

    def predict(self, session: str, step: int = 0) -> np.ndarray:
        key = TaskKey(session, PREDICT, step, 0)
        task = Task(key=key, turn=0, seed=0, learning_rate=0.0, tensors={"h": draw(0)["h"]})
        return self.submit(task)[0].tensors["y"]

    def tick(self) -> list[Delivery]:
        return list(self.policy.tick(self.now))

    def model(self, session: str = ANN) -> ServerModel:
        return self.policy.models[session]

    def state(self) -> dict[str, bytes]:
        return {name: a.tobytes() for name, a in self.model().executor.state().items()}

    def kill(self, *, is_noticed: bool = True) -> None:
        """End the process that holds the model."""
        executor = self.model().executor
        assert isinstance(executor, Mortal)
        executor.is_dead, executor.is_noticed = True, is_noticed


DONE = [("a", "h.grad loss"), ("a", "done")]
"""What comes of Ann's step."""
