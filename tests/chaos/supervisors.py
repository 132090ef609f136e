"""Keeps a process running: killed or stopped, it is started again at once.

An end that nobody asked for is a failure, except exit code 0 of a process that has work to finish.
It knows commands and signals, and nothing of what the process does.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.conftest import ROOT

STUMBLES = 0.2
"""How many of the fresh processes that replace a killed one are killed while they start."""
LONGEST_START = 0.6
"""Seconds within which such a process is killed."""
PATIENCE = 60.0
"""Seconds that a process may take to leave."""
TAIL = 4000
"""Characters of a log that a failure shows."""


class Collapse(Exception):
    """A process ended by itself, or did not end when it was asked to."""


class Keeper:
    """One command that runs until it succeeds or is closed.

    ``hear`` is called with each line that it prints on stdout or stderr; both go to ``log``.
    ``forget`` is called whenever the process is gone.  ``kills`` counts those that were asked for,
    ``stumbles`` those of a fresh process while it started, ``stops`` the exits at SIGTERM.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        hear: Callable[[str], None],
        forget: Callable[[], None] = lambda: None,
        seed: str,
    ) -> None:
        self.kills = self.stops = self.stumbles = 0
        self._command = command
        self._log = log
        self._hear = hear
        self._forget = forget
        self._chance = random.Random(seed)
        self._process: asyncio.subprocess.Process | None = None
        self._wanted: set[str] = set()
        self._speaks = False
        self._closing = False

    async def keep(self) -> None:
        """Run the command until it succeeds, or until :meth:`close`.

        Raises:
            Collapse: it ended by itself, without success.
        """
        while True:
            code = await self._run()
            asked, self._wanted = self._wanted, set()
            if self._closing or (code == 0 and "stop" not in asked):
                return
            if code == 0:
                self.stops += 1
            elif code == -signal.SIGKILL and "kill" in asked:
                self.kills += 1
            elif code == -signal.SIGKILL and "stumble" in asked:
                self.stumbles += 1
            else:
                raise Collapse(f"{self} ended with code {code}\n{self.tail()}")

    def kill(self) -> None:
        """``kill -9``, now; nothing where no process runs."""
        self._signal("kill", signal.SIGKILL)

    def stop(self) -> None:
        """Send SIGTERM, once; the process is expected to leave in good order."""
        if "stop" not in self._wanted:
            self._signal("stop", signal.SIGTERM)

    def dump(self) -> None:
        """Have the process write where each of its threads stands, and end."""
        self._signal("dump", signal.SIGABRT)

    async def finish(self) -> None:
        """Send SIGTERM and wait for the process to leave in good order, for good.

        Raises:
            Collapse: it does not within a minute, or with another exit code than 0.
        """
        assert self._process is not None
        self._closing = True
        self._signal("stop", signal.SIGTERM)
        try:
            code = await asyncio.wait_for(self._process.wait(), PATIENCE)
        except TimeoutError:
            raise Collapse(f"{self} did not leave at SIGTERM\n{self.tail()}") from None
        if code and (self._speaks or code != -signal.SIGTERM):
            raise Collapse(f"{self} left with code {code} at SIGTERM\n{self.tail()}")

    async def close(self) -> None:
        """End the process, for good."""
        self._closing = True
        self._signal("close", signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()

    def tail(self) -> str:
        """Return the end of the log."""
        return self._log.read_text(errors="replace")[-TAIL:] if self._log.exists() else ""

    def __str__(self) -> str:
        return " ".join(self._command[:5])

    def _signal(self, name: str, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._wanted.add(name)
            # not by send_signal, which looks first whether the process ended, and where it just has
            # takes the exit code away from asyncio's own watcher
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    async def _run(self) -> int:
        self._speaks = False
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=ROOT,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        timer = self._stumble()
        try:
            await self._listen(self._process)
            return await self._process.wait()
        finally:
            self._forget()
            if timer is not None:
                timer.cancel()

    def _stumble(self) -> asyncio.TimerHandle | None:
        if not self.kills or self._chance.random() >= STUMBLES:
            return None
        delay = self._chance.uniform(0, LONGEST_START)
        loop = asyncio.get_running_loop()
        return loop.call_later(delay, self._signal, "stumble", signal.SIGKILL)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with self._log.open("a") as log:
            log.write(f"--- {self}, process {process.pid}\n")
            while line := (await process.stdout.readline()).decode(errors="replace"):
                log.write(line)
                log.flush()
                self._speaks = True
                self._hear(line)
