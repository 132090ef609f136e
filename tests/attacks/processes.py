"""Servers and commands of the checkout under attack, each a process of its own."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BEGIN_SECONDS = 60.0
"""Within which a server must tell its address."""
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What came of a command; ``code`` is ``None`` where it was killed at its bound of time."""

    code: int | None
    seconds: float
    printed: str

    @property
    def last_line(self) -> str:
        lines = self.printed.strip().splitlines()
        return lines[-1] if lines else ""

    @property
    def how(self) -> str:
        """Tell its end: a signal, a traceback, an exit code."""
        if self.code is None:
            return f"still running after {self.seconds:.0f} s"
        if self.code < 0:
            return name_signal(-self.code)
        if "Traceback" in self.printed:
            return "traceback"
        return f"exit {self.code}"

    @property
    def is_refusal(self) -> bool:
        """Whether it is an error of one sentence, as all of splitonnx's are."""
        return self.code == 2 and self.last_line.startswith("splitonnx: ")


def name_signal(number: int) -> str:
    """Name a signal."""
    return signal.Signals(number).name


class Checkout:
    """The code under attack; its processes find it by PYTHONPATH."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
        self._known = ""

    def knows(self, option: str) -> bool:
        """Whether its ``serve`` takes an option."""
        if not self._known:
            self._known = self.run("serve", "--help").printed
        return option in self._known

    def command(self, *words: object, through: Sequence[object] = ()) -> list[str]:
        """Write the command line of splitonnx; ``through`` is a script that runs it, with words."""
        return [sys.executable, *map(str, through or ("-m", "splitonnx")), *map(str, words)]

    def run(
        self,
        *words: object,
        seconds: float = 120.0,
        folder: Path | None = None,
        through: Sequence[object] = (),
    ) -> Ended:
        """Run a command of splitonnx to its end, or kill it at the bound."""
        begun = time.monotonic()
        with subprocess.Popen(
            self.command(*words, through=through),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
            cwd=folder or "/",
            start_new_session=True,
        ) as process:
            try:
                printed, _ = process.communicate(timeout=seconds)
                code: int | None = process.returncode
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                printed, _ = process.communicate()
                code = None
        return Ended(code=code, seconds=time.monotonic() - begun, printed=printed)

    def must(self, *words: object, seconds: float = 120.0) -> str:
        """Run a command that must succeed, and give what it printed."""
        ended = self.run(*words, seconds=seconds)
        if ended.code != 0:
            raise RuntimeError(f"{' '.join(map(str, words))}: {ended.how}: {ended.printed}")
        return ended.printed


class Server:
    """``splitonnx serve`` on a folder; options that the checkout does not know are left out.

    ``files`` bounds its open files; ``through`` is a script that runs it.
    """

    def __init__(
        self,
        checkout: Checkout,
        folder: Path,
        *options: str | tuple[str, object],
        files: int | None = None,
        through: Sequence[object] = (),
    ) -> None:
        words: list[object] = []
        for option in options:
            name, *value = (option,) if isinstance(option, str) else option
            if checkout.knows(str(name)):
                words += [name, *value]

        def bound() -> None:
            if files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

        log_folder = folder.parent
        number = sum(1 for _ in log_folder.glob("log*"))
        self._log = log_folder / f"log{number}"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                checkout.command("serve", folder, "--port", 0, *words, through=through),
                stdout=log,
                stderr=log,
                env=checkout.environment,
                cwd="/",
                start_new_session=True,
                preexec_fn=bound,
            )
        self.url = self.wait_for(r"wss?://[^\s\"]+:\d+")
        self.port = int(self.url.rsplit(":", 1)[1])

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def death(self, seconds: float = 5.0) -> str | None:
        """Tell by what the process ended within a time; ``None`` where it lives."""
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(seconds)
            return name_signal(-code) if code < 0 else f"exit {code}"
        return None

    def processes(self) -> list[int]:
        """List the server's process and those that it began."""
        found, pending = [], [self.process.pid]
        while pending:
            one = pending.pop()
            found.append(one)
            with suppress(OSError):
                for thread in Path(f"/proc/{one}/task").iterdir():
                    pending += map(int, (thread / "children").read_text().split())
        return found

    def memory_mib(self, field: str = "VmRSS") -> float:
        """Measure the memory of the server's processes together; ``VmHWM`` is the most so far."""
        total = 0
        for one in self.processes():
            with suppress(OSError):
                found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{one}/status").read_text())
                total += int(found[1]) if found else 0
        return total / 1024

    def stop(self, seconds: float = 30.0) -> str | None:
        """Ask the server to end, and tell how it did; ``None`` where it did not."""
        self.process.send_signal(signal.SIGTERM)
        return self.death(seconds)

    def kill(self) -> None:
        """End every process of the server."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_for(self, pattern: str) -> str:
        """Wait until the log says something, and return it.

        Raises:
            NotServed: the server ended, or did not say it within the time.
        """
        pause, end = threading.Event(), time.monotonic() + BEGIN_SECONDS
        while time.monotonic() < end:
            found = re.search(pattern, self.log)
            if found:
                return found[0]
            if self.process.poll() is not None:
                break
            pause.wait(0.02)
        self.kill()
        raise NotServed(self.log.strip().splitlines()[-1:] or ["nothing was printed"])


class NotServed(Exception):
    """A server did not begin; its last line."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(lines[-1])


def make_token(checkout: Checkout, name: str, file: Path, *options: object) -> str:
    """Make a token by the command line."""
    printed = checkout.must("token", name, "--token-file", file, *options)
    (token,) = re.findall(r"^[\w-]{43}$", printed, re.MULTILINE)
    return str(token)
