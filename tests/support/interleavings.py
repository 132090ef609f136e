"""Executors of both parties, wired in memory, whose micro-batches progress in any order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from splitonnx.bundles import Bundle
from splitonnx.messages import TaskKey
from splitonnx.micro_batches import MICRO_BATCH_WEIGHT, MICRO_BATCHES, split_batch
from splitonnx.names import ACCUMULATE, UPDATE
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor

Choose = Callable[[int], int]
"""Returns one of the numbers below a number."""
ENGINE = Engine(threads=1)


@dataclass(kw_only=True, eq=False)
class Side:
    """One party: its executor, its open tasks, and what was sent to it, each task's in order."""

    executor: Executor
    open: list[TaskKey] = field(default_factory=list)
    inbox: dict[TaskKey, deque[Mapping[str, np.ndarray]]] = field(default_factory=dict)
    results: list[Mapping[str, np.ndarray]] = field(default_factory=list)

    def begin(self, key: TaskKey, data: Mapping[str, np.ndarray], other: Side) -> None:
        """Open a task."""
        self.executor.begin(key, data=data, seed=11, learning_rate=0.05)
        self.open.append(key)
        self.inbox[key] = deque()
        self.run(key, other)

    def run(self, key: TaskKey, other: Side) -> None:
        """Run what is ready of a task, and send what it makes."""
        for wires in self.executor.advance(key):
            copies = {name: array.copy() for name, array in wires.items()}
            if key not in other.inbox:
                other.begin(key, {}, self)
            other.inbox[key].append(copies)

    def settle(self, choose: Choose, other: Side) -> None:
        """Run what waited, in any order, and finish what can be finished."""
        for _ in tuple(self.open):  # each may have waited for any other
            for key in shuffle(self.open, choose):
                if self.executor.is_waiting(key):
                    self.run(key, other)
            while self.open and self.executor.is_finished(self.open[0]):
                self.results.append(self.executor.finish(self.open.pop(0)))


def shuffle(keys: Sequence[TaskKey], choose: Choose) -> list[TaskKey]:
    left = list(keys)
    return [left.pop(choose(len(left))) for _ in keys]


@dataclass(frozen=True, kw_only=True, eq=False)
class Interleaving:
    """What trains steps of several micro-batches, of which at most ``in_flight`` are open.

    ``prepared`` are executors with loaded stages, of which each training takes a fork.
    """

    bundle: Bundle
    prepared: Mapping[str, Executor]
    parts: int

    @classmethod
    def make(cls, bundle: Bundle, parts: int) -> Interleaving:
        """Load the stages of both parties."""
        prepared = {name: Executor(party, ENGINE) for name, party in bundle.parties.items()}
        for executor in prepared.values():
            for phase in (ACCUMULATE, UPDATE):
                executor.prepare(phase)
        return cls(bundle=bundle, prepared=prepared, parts=parts)

    def train(
        self, batches: Sequence[Mapping[str, np.ndarray]], in_flight: int, choose: Choose
    ) -> dict[str, np.ndarray]:
        """Return the results and the state after training on batches, in an order of choice."""
        client, server = (Side(executor=self.prepared[n].fork()) for n in ("client", "server"))
        for batch in batches:
            self._take_step(client, server, batch, in_flight, choose)
        found = {**client.executor.state(), **server.executor.state()}
        for number, results in enumerate(client.results):
            found |= {f"result {number} {name}": array for name, array in results.items()}
        return found

    def _take_step(
        self,
        client: Side,
        server: Side,
        batch: Mapping[str, np.ndarray],
        in_flight: int,
        choose: Choose,
    ) -> None:
        specs = client.executor.manifest.phase("train").data
        parts = split_batch(batch, specs, self.parts)
        step, weight = client.executor.step, np.array(1 / len(parts), np.float32)
        waiting = deque(
            (TaskKey("s", ACCUMULATE, step, number), {**part, MICRO_BATCH_WEIGHT: weight})
            for number, part in enumerate(parts)
        )
        count: dict[str, np.ndarray] = {MICRO_BATCHES: np.array(len(parts))}
        waiting.append((TaskKey("s", UPDATE, step, len(parts)), count))
        while waiting or client.open or server.open:
            moves: list[tuple[Side, Side, TaskKey | None]] = [
                (here, there, key)
                for here, there in ((client, server), (server, client))
                for key in here.open
                if here.inbox[key]
            ]
            if waiting and len(client.open) < in_flight:
                moves.append((client, server, None))
            assert moves  # otherwise both wait forever
            here, there, key = moves[choose(len(moves))]
            if key is None:
                here.begin(*waiting.popleft(), there)
            else:
                here.executor.deliver(key, here.inbox[key].popleft())
                here.run(key, there)
            here.settle(choose, there)
            there.settle(choose, here)
        client.inbox.clear()
        server.inbox.clear()
