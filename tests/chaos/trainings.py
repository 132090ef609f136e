"""One training by two processes, calm or through faults, and the tally of what happened.

It brings together proxy, keepers and commands, and watches that something moves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from tests.chaos import scenarios
from tests.chaos.faults import Fault, Kind
from tests.chaos.proxies import Proxy
from tests.chaos.scenarios import STEPS_AN_EPOCH, Step
from tests.chaos.supervisors import Collapse, Keeper

STALL = 60.0
"""Seconds without a step after which the training hangs."""
INTERVAL = 10.0
"""Seconds from one line of progress to the next."""


class Training:
    """A training of the bundle in ``folder``; with ``faults``, through a proxy that has them.

    ``losses`` are by step, as the client told them; ``contradictions`` says where a step that was
    made anew, after a side went back to a checkpoint, came to another loss.
    """

    def __init__(
        self, name: str, folder: Path, epochs: int, faults: Iterator[Fault] | None, seed: str
    ) -> None:
        self.steps = epochs * STEPS_AN_EPOCH
        self.told = 0
        self.last = Step(step=0, loss=0.0, bytes_up=0, bytes_down=0)
        self.losses: dict[int, float] = {}
        self.contradictions: list[str] = []
        self.server = Keeper(
            scenarios.serve_command(folder),
            folder / "server.log",
            hear=self._hear_server,
            forget=self._forget_server,
            seed=f"{seed} server",
        )
        self.client: Keeper | None = None
        self._name = name
        self._folder = folder
        self._epochs = epochs
        self._seed = seed
        self._proxy = None if faults is None else Proxy(faults, self._strike)
        self._port: asyncio.Future[int] | None = None
        self._start = self._moved = time.monotonic()

    def run(self, show: Callable[[str], None]) -> None:
        """Train until the client is done; tell how it goes now and then.

        Raises:
            Collapse: a process ended by itself, nothing moves, or the server does not stop.
        """
        asyncio.run(self._run(show))

    @property
    def cuts(self) -> int:
        """How often a connection was cut."""
        return 0 if self._proxy is None else self._proxy.cuts

    @property
    def kills(self) -> dict[str, int]:
        """How often each party was killed while it trained."""
        client = 0 if self.client is None else self.client.kills
        return {"server": self.server.kills, "client": client}

    def __str__(self) -> str:
        seconds = time.monotonic() - self._start
        progress = f"{self._name:9} step {self.last.step:5} of {self.steps}  {seconds:4.0f} s"
        if self._proxy is None:
            return f"{progress}  without faults"
        stumbles = self.server.stumbles + (self.client.stumbles if self.client else 0)
        kills = " + ".join(f"{count} {party}" for party, count in self.kills.items())
        return (
            f"{progress}  {self.cuts} cuts, kills {kills} + {stumbles} in starting, "
            f"{self.server.stops} stops, {self.told - len(self.losses)} steps made anew"
        )

    async def _run(self, show: Callable[[str], None]) -> None:
        self._port = asyncio.get_running_loop().create_future()
        async with AsyncExitStack() as stack:
            if self._proxy is not None:
                await stack.enter_async_context(self._proxy.listening())
            serving = asyncio.ensure_future(self.server.keep())
            stack.push_async_callback(self._end, serving, self.server)
            port = await self._wait_for_port(serving)
            self.client = Keeper(
                scenarios.train_command(self._folder, port, self._epochs),
                self._folder / "client.log",
                hear=self._hear_client,
                seed=f"{self._seed} client",
            )
            training = asyncio.ensure_future(self.client.keep())
            stack.push_async_callback(self._end, training, self.client)
            await self._watch(serving, training, show)
            await self.server.finish()

    async def _wait_for_port(self, serving: asyncio.Future[None]) -> int:
        """Wait for the server to listen; return the port that the client is to be told."""
        assert self._port is not None
        serving.add_done_callback(self._give_up_port)
        port = await self._port
        return port if self._proxy is None else self._proxy.port

    def _give_up_port(self, serving: asyncio.Future[None]) -> None:
        if self._port is not None and not self._port.done():
            error = serving.exception() or Collapse("the server left before it listened")
            self._port.set_exception(error)

    async def _watch(
        self,
        serving: asyncio.Future[None],
        training: asyncio.Future[None],
        show: Callable[[str], None],
    ) -> None:
        assert self.client is not None
        while not training.done():
            await asyncio.wait(
                [serving, training], timeout=INTERVAL, return_when=asyncio.FIRST_COMPLETED
            )
            if serving.done():
                await serving
                raise Collapse("the server left before the client was done")
            if time.monotonic() - self._moved > STALL:
                for keeper in (self.server, self.client):
                    keeper.dump()
                await asyncio.wait([serving, training])
                raise Collapse(
                    f"no step for {STALL:g} s\n{self.client.tail()}\n{self.server.tail()}"
                )
            if not training.done():
                show(str(self))
        await training

    async def _end(self, task: asyncio.Future[None], keeper: Keeper) -> None:
        await keeper.close()
        with suppress(Collapse):
            await task

    def _hear_server(self, line: str) -> None:
        port = scenarios.read_port(line)
        if port is None:
            return
        if self._proxy is not None:
            self._proxy.upstream = port
        if self._port is not None and not self._port.done():
            self._port.set_result(port)

    def _forget_server(self) -> None:
        if self._proxy is not None:
            self._proxy.upstream = None

    def _hear_client(self, line: str) -> None:
        step = scenarios.read_step(line)
        if step is None:
            return
        self.last = step
        self.told += 1
        self._moved = time.monotonic()
        known = self.losses.setdefault(step.step, step.loss)
        if known != step.loss:
            self.contradictions.append(f"step {step.step} came to {known}, then to {step.loss}")

    def _strike(self, kind: Kind) -> None:
        if kind is Kind.STOP_SERVER:
            self.server.stop()
        if kind in (Kind.KILL_SERVER, Kind.KILL_BOTH):
            self.server.kill()
        if kind in (Kind.KILL_CLIENT, Kind.KILL_BOTH) and self.client is not None:
            self.client.kill()
