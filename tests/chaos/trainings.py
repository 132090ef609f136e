"""One training by a server and its clients, calm or through faults, and the tally of what happened.

It brings together proxies, keepers and commands, and watches that something moves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

from tests.chaos import scenarios
from tests.chaos.faults import Fault, Kind
from tests.chaos.proxies import Proxy
from tests.chaos.scenarios import Scenario, Step
from tests.chaos.supervisors import Collapse, Keeper

STALL = 60.0
"""Seconds without a step after which the training hangs, for each of up to four clients, since one
that waits longer and longer to connect again holds up the others."""
END = 6
"""Steps before the end from which faults strike again, so that they strike what is done there."""
INTERVAL = 10.0
"""Seconds from one line of progress to the next."""


class Trainee:
    """What one client told: ``losses`` by step, the ``last`` step, and how many it ``told``.

    ``contradictions`` says where a step that was made anew, after a side went back to a checkpoint,
    came to another loss.  ``keeper`` runs the client's process once the server listens, and
    ``proxy`` is the client's own way to the server, ``None`` where nothing is to be cut.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.told = 0
        self.last = Step(step=0, loss=0.0, bytes_up=0, bytes_down=0)
        self.losses: dict[int, float] = {}
        self.contradictions: list[str] = []
        self.moved = time.monotonic()
        self.keeper: Keeper | None = None
        self.proxy: Proxy | None = None

    def hear(self, line: str) -> None:
        """Take note of a step that the client tells."""
        step = scenarios.read_step(line)
        if step is None:
            return
        self.last = step
        self.told += 1
        self.moved = time.monotonic()
        known = self.losses.setdefault(step.step, step.loss)
        if known != step.loss:
            self.contradictions.append(
                f"{self.name}: step {step.step} came to {known}, then to {step.loss}"
            )


class Training:
    """A training of the bundle in ``folder``; each client makes ``steps``.

    ``faults`` are those of each client's connections, which pass through a proxy of its own;
    without them, there is no proxy.  Once there were ``enough``, connections have no more of them
    until the last ``END`` steps.
    """

    def __init__(
        self,
        scenario: Scenario,
        folder: Path,
        steps: int,
        faults: Sequence[Iterator[Fault]],
        seed: str,
        enough: Callable[[Training], bool] = lambda _: False,
    ) -> None:
        self.steps = steps
        self.trainees = [Trainee(name) for name in scenario.names]
        self.server = Keeper(
            scenarios.serve_command(scenario, folder, steps),
            folder / "server.log",
            hear=self._hear_server,
            forget=self._forget_server,
            seed=f"{seed} server",
        )
        self._scenario = scenario
        self._folder = folder
        self._seed = seed
        self._enough = enough
        self._stall = STALL * min(4, len(self.trainees))
        for trainee, row in zip(self.trainees, faults, strict=False):
            trainee.proxy = Proxy(self._choose(row), partial(self._strike, trainee))
        self._port: asyncio.Future[int] | None = None
        self._start = time.monotonic()

    def run(self, show: Callable[[str], None]) -> None:
        """Train until the client is done; tell how it goes now and then.

        Raises:
            Collapse: a process ended by itself, nothing moves, or the server does not stop.
        """
        asyncio.run(self._run(show))

    @property
    def cuts(self) -> int:
        """How often a connection was cut."""
        return sum(proxy.cuts for proxy in self._proxies)

    @property
    def kills(self) -> dict[str, int]:
        """How often the server and the clients were killed while they trained."""
        clients = sum(keeper.kills for keeper in self._keepers)
        return {"server": self.server.kills, "client": clients}

    @property
    def made(self) -> int:
        """How many steps all clients made, without those that were made anew."""
        return sum(trainee.last.step for trainee in self.trainees)

    def __str__(self) -> str:
        seconds = time.monotonic() - self._start
        slowest = min(trainee.last.step for trainee in self.trainees)
        progress = f"{self._scenario.name:9} step {slowest:5} of {self.steps}  {seconds:4.0f} s"
        if not self._proxies:
            return f"{progress}  without faults"
        stumbles = self.server.stumbles + sum(keeper.stumbles for keeper in self._keepers)
        kills = " + ".join(f"{count} {party}" for party, count in self.kills.items())
        anew = sum(trainee.told - len(trainee.losses) for trainee in self.trainees)
        return (
            f"{progress}  {self.cuts} cuts, kills {kills} + {stumbles} in starting, "
            f"{self.server.stops} stops, {anew} steps made anew"
        )

    def _choose(self, faults: Iterator[Fault]) -> Iterator[Fault | None]:
        """Yield each connection's fault, or ``None`` where there were enough."""
        for fault in faults:
            is_ending = max(trainee.last.step for trainee in self.trainees) >= self.steps - END
            yield fault if is_ending or not self._enough(self) else None

    @property
    def _proxies(self) -> list[Proxy]:
        return [trainee.proxy for trainee in self.trainees if trainee.proxy is not None]

    @property
    def _keepers(self) -> list[Keeper]:
        return [trainee.keeper for trainee in self.trainees if trainee.keeper is not None]

    async def _run(self, show: Callable[[str], None]) -> None:
        self._port = asyncio.get_running_loop().create_future()
        async with AsyncExitStack() as stack:
            for proxy in self._proxies:
                await stack.enter_async_context(proxy.listening())
            serving = asyncio.ensure_future(self.server.keep())
            stack.push_async_callback(self._end, serving, self.server)
            serving.add_done_callback(self._give_up_port)
            port = await self._port
            training = []
            for trainee in self.trainees:
                keeper = trainee.keeper = self._make_keeper(trainee, port)
                training.append(asyncio.ensure_future(keeper.keep()))
                stack.push_async_callback(self._end, training[-1], keeper)
            await self._watch(serving, training, show)
            await self.server.finish()

    def _make_keeper(self, trainee: Trainee, port: int) -> Keeper:
        name = trainee.name
        own = port if trainee.proxy is None else trainee.proxy.port
        return Keeper(
            scenarios.train_command(self._scenario, self._folder, name, own, self.steps),
            self._folder / f"{name}.log",
            hear=trainee.hear,
            seed=f"{self._seed} {name}",
        )

    def _give_up_port(self, serving: asyncio.Future[None]) -> None:
        if self._port is not None and not self._port.done():
            error = serving.exception() or Collapse("the server left before it listened")
            self._port.set_exception(error)

    async def _watch(
        self,
        serving: asyncio.Future[None],
        training: Sequence[asyncio.Future[None]],
        show: Callable[[str], None],
    ) -> None:
        """Wait for all clients; a step of any of them is a sign of life."""
        waiting = set(training)
        while waiting:
            done, _ = await asyncio.wait(
                [serving, *waiting], timeout=INTERVAL, return_when=asyncio.FIRST_COMPLETED
            )
            if serving in done:
                await serving
                raise Collapse("the server left before the clients were done")
            for task in done:
                await task
            waiting -= done
            if waiting and time.monotonic() - max(t.moved for t in self.trainees) > self._stall:
                await self._give_up([serving, *waiting])
            if waiting:
                show(str(self))

    async def _give_up(self, tasks: Sequence[asyncio.Future[None]]) -> None:
        """Have every process write where it stands, and tell it."""
        for keeper in (self.server, *self._keepers):
            keeper.dump()
        await asyncio.wait(tasks)
        tails = [keeper.tail() for keeper in (*self._keepers, self.server)]
        raise Collapse("\n".join([f"no step for {self._stall:g} s", *tails]))

    async def _end(self, task: asyncio.Future[None], keeper: Keeper) -> None:
        await keeper.close()
        with suppress(Collapse):
            await task

    def _hear_server(self, line: str) -> None:
        port = scenarios.read_port(line)
        if port is None:
            return
        for proxy in self._proxies:
            proxy.upstream = port
        if self._port is not None and not self._port.done():
            self._port.set_result(port)

    def _forget_server(self) -> None:
        for proxy in self._proxies:
            proxy.upstream = None

    def _strike(self, trainee: Trainee, kind: Kind) -> None:
        if kind is Kind.STOP_SERVER:
            self.server.stop()
        if kind in (Kind.KILL_SERVER, Kind.KILL_BOTH):
            self.server.kill()
        if kind in (Kind.KILL_CLIENT, Kind.KILL_BOTH) and trainee.keeper is not None:
            trainee.keeper.kill()
