"""A policy and the server's models in processes of their own, each at the end of a pipe.

Only data cross the pipes: names of methods, their arguments, and what they return or yield.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from splitonnx.bundles import PartyBundle
from splitonnx.messages import Hello, TaskKey
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.model_makers import ModelMaker
from splitonnx.runtime.server.policies.models import ServerModel
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.policies.policies import Policy
from splitonnx.runtime.server.policies.tasks import Delivery, Task
from splitonnx.runtime.storage.archives import Archive

_YIELDING = frozenset({"perform", "submit", "tick"})
"""Methods whose results are sent one after the other."""


@dataclass(frozen=True)
class Remote:
    """An object at the other end of a pipe."""

    pipe: Connection

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: object, **settings: object) -> Any:
            self.pipe.send((method, arguments, settings))
            return self._iterate() if method in _YIELDING else self.pipe.recv()[1]

        return call

    def _iterate(self) -> Iterator[Any]:
        while (received := self.pipe.recv())[0]:
            yield received[1]


def answer(pipe: Connection, target: object) -> None:
    """Carry out what arrives on a pipe, until it is closed."""
    while True:
        try:
            method, arguments, settings = pipe.recv()
        except EOFError:
            return
        result = getattr(target, method)(*arguments, **settings)
        if method in _YIELDING:
            for each in result:
                pipe.send((True, each))
            result = None
        pipe.send((False, result))


class Models:
    """The models of all sessions, by their names."""

    def __init__(self, folder: Path) -> None:
        party = PartyBundle.load(folder)
        archive = Archive(folder, party.manifest, most_bytes=None, keep_seconds=None)
        self._maker = ModelMaker(Executor(party, Engine(threads=1)), archive, None)
        self._models: dict[str, ServerModel] = {}

    def make(self, hello: Hello, owner: str) -> str:
        """Make the model of a session, and return its owner."""
        self._models[hello.session] = self._maker.make(hello, owner)
        return self._models[hello.session].owner

    def get(self, session: str, name: str) -> Any:
        """Return what a model's property says."""
        return getattr(self._models[session], name)

    def call(self, session: str, name: str, settings: Mapping[str, object]) -> Any:
        """Call a method of a model."""
        return getattr(self._models[session], name)(**settings)

    def perform(self, task: Task) -> Iterator[Delivery]:
        """Run a task with a session's model."""
        return self._models[task.key.session].perform(task)


class RemoteModel:
    """A model in the other process, with the methods of a :class:`ServerModel`."""

    def __init__(self, models: Remote, session: str, owner: str) -> None:
        self.owner = owner
        self._models, self._session = models, session

    def __getattr__(self, name: str) -> Any:
        if name in ("version", "is_saved", "is_lost"):
            return self._models.get(self._session, name)

        def call(key: TaskKey | None = None, **settings: object) -> Any:
            given = settings if key is None else {"key": key, **settings}
            return self._models.call(self._session, name, given)

        return call

    def perform(self, task: Task) -> Iterator[Delivery]:
        return cast("Iterator[Delivery]", self._models.perform(task))


class RemoteModels:
    """What a policy makes its models with, if they are in the other process."""

    def __init__(self, models: Remote) -> None:
        self._models = models

    def load(self, hello: Hello, owner: str) -> ServerModel | None:
        return None  # no session has a checkpoint when it joins

    def make(self, hello: Hello, owner: str) -> ServerModel:
        found = self._models.make(hello, owner)
        return cast("ServerModel", RemoteModel(self._models, hello.session, found))


def run_models(pipe: Connection, folder: Path) -> None:
    answer(pipe, Models(folder))


def run_policy(pipe: Connection, models: Connection) -> None:
    answer(pipe, PerClient(RemoteModels(Remote(models))))


@contextmanager
def placed_apart(folder: Path) -> Iterator[Policy]:
    """Run the models of a server's folder in a process, and a policy over them in another one."""
    spawning = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        own, policy_end = spawning.Pipe()
        asking, models_end = spawning.Pipe()
        for target, arguments in (
            (run_policy, (policy_end, asking)),
            (run_models, (models_end, folder)),
        ):
            process = spawning.Process(target=target, args=arguments, daemon=True)
            process.start()
            stack.callback(process.join)
        for end in (policy_end, asking, models_end):
            end.close()  # the processes have copies, and end when these are the last
        stack.callback(own.close)
        yield cast("Policy", Remote(own))
