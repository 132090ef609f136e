"""A real server under attack, with an honest client that trains in it all the while."""

from __future__ import annotations

import json
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np

from splitonnx.messages import (
    Fault,
    Hello,
    Message,
    Tensors,
    Welcome,
    decode_message,
    encode_message,
)
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.websockets import connect
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.edge.tokens import add_token
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.runtime.wire.protocols import list_wires
from splitonnx.runtime.wire.transports import Transport
from tests.support.echoes import PATIENCE
from tests.support.event_loops import UVLOOP, make_environment
from tests.support.zoo import ZOO

DATA = ZOO["chain"].data(24)
FORWARD = "act1@server"
"""The wire that begins a step, F32[N, 7]."""
MIB = 1 << 20


class Arena:
    """A server in a process of its own; ``ana`` trains in it, ``eve`` has a token too.

    ``loop`` is the event loop that the server runs on, one of ``tests.support.event_loops.LOOPS``.
    """

    def __init__(self, folder: Path, *options: object, loop: str = UVLOOP) -> None:
        self.bundle = cut(ZOO["chain"].build(), at="act1", tail_at="act3")
        self.bundle.save(folder / "bundle")
        self.tokens = {name: add_token(folder / "tokens", name) for name in ("ana", "eve")}
        command = [
            sys.executable, "-m", "splitonnx", "serve", folder / "bundle" / "server", "--port", 0,
            "--threads", 1, "--token-file", folder / "tokens", *options,
        ]  # fmt: skip
        self._log = folder / "log"  # a pipe that nobody reads would stop the server
        with self._log.open("w") as log:
            environment = make_environment(loop, folder)
            self.process = subprocess.Popen(list(map(str, command)), stderr=log, env=environment)
        self.url = self._wait_for_url()
        self.port = int(self.url.rsplit(":", 1)[1])
        self._trainer = threading.Thread(target=self._train)
        self._advanced = threading.Condition()
        self._done = threading.Event()
        self._fault: BaseException | None = None
        self.steps = self.connections = 0
        self.weights: dict[str, np.ndarray] = {}
        self._trainer.start()

    def _wait_for_url(self) -> str:
        pause = threading.Event()
        for _ in range(1000):
            found = re.search(r"ws://\S+", self._log.read_text())
            if found:
                return found[0]
            assert self.process.poll() is None, self._log.read_text()
            pause.wait(0.02)  # until the process has begun; nothing else tells
        raise AssertionError("the server does not begin")

    def credentials(self, name: str) -> Credentials:
        return Credentials(token=self.tokens[name])

    @property
    def resident_mib(self) -> float:
        """Memory of the server's process now."""
        return self._read_status("VmRSS")

    @property
    def peak_mib(self) -> float:
        """The most memory that the server's process had since the last :meth:`forget_peak`."""
        return self._read_status("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    @property
    def log(self) -> str:
        return self._log.read_text()

    def count_refusals(self, *reasons: str) -> int:
        """Count what the server refused for these reasons, as Prometheus is told."""
        headers = {"Authorization": f"Bearer {self.tokens['ana']}"}
        request = Request(f"http://127.0.0.1:{self.port}/metrics", headers=headers)
        with urlopen(request, timeout=PATIENCE) as response:
            text = response.read().decode()
        found = re.findall(r'^splitonnx_refusals_total{reason="(\w+)"} (\S+)', text, re.MULTILINE)
        return sum(int(float(count)) for reason, count in found if reason in reasons)

    def expect_refusal(self, reason: str, times: int) -> None:
        """Wait until there was a refusal for the ``times``-th time."""
        pause = threading.Event()
        for _ in range(int(PATIENCE / 0.02)):
            if self.count_refusals(reason) >= times:
                return
            pause.wait(0.02)
        raise AssertionError(f"no {times} x {reason} in: {self.log[-2000:]}")

    def expect_progress(self) -> None:
        """Wait until the honest client has made two more steps: one wholly after this call."""
        if self._done.is_set():
            return
        with self._advanced:
            aim = self.steps + 2
            assert self._advanced.wait_for(lambda: self.steps >= aim or self._fault, PATIENCE)
        assert self._fault is None, self._fault

    def finish(self) -> None:
        """Let the honest client come to its end."""
        self._done.set()
        self._trainer.join()

    def close(self) -> None:
        self.finish()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=60) == 0

    def train_undisturbed(self) -> dict[str, np.ndarray]:
        """Train as many steps as the honest client made, with nobody else there."""
        assert self.bundle.server is not None
        link = connect_in_memory(Executor(self.bundle.server, Engine(1)))
        with Client(self.bundle.client, link, threads=1) as client:
            for step in range(self.steps):
                client.step(_choose_batch(step))
            return dict(client.state())

    def _train(self) -> None:
        try:
            with Client(self.bundle.client, self._dial, threads=1) as client:
                while not self._done.wait(0.005):  # leaves the attackers their share
                    client.step(_choose_batch(self.steps))
                    with self._advanced:
                        self.steps += 1
                        self._advanced.notify_all()
                self.weights = dict(client.state())
        except BaseException as error:
            self._fault = error
            raise

    def _dial(self) -> Transport:
        self.connections += 1
        return connect(self.url, credentials=self.credentials("ana"))

    def _read_status(self, field: str) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{field}:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1024


def _choose_batch(step: int) -> dict[str, np.ndarray]:
    start = step % 3 * 8
    return {name: array[start : start + 8] for name, array in DATA.items()}


class Attacker:
    """A connection with a token, that says whatever it likes."""

    def __init__(self, arena: Arena, name: str = "eve") -> None:
        self._manifest = arena.bundle.client.manifest
        self._transport = connect(arena.url, credentials=arena.credentials(name))
        self.session = uuid.uuid4().hex

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        self._transport.close()

    def ask(
        self, message: Message | bytes, tensors: dict[str, np.ndarray] | None = None
    ) -> tuple[Message, bytes]:
        """Send a message or bytes; give the answer, read and raw."""
        chunks = [message] if isinstance(message, bytes) else encode_message(message, tensors)
        self._transport.send(chunks)
        content = bytes(self._transport.receive())
        return decode_message(content)[0], content

    def expect_fault(
        self, code: str, message: Message | bytes, tensors: dict[str, np.ndarray] | None = None
    ) -> str:
        """Send it, expect to be told of an error of this class, and give the reason."""
        fault, _ = self.ask(message, tensors)
        assert isinstance(fault, Fault), fault
        assert fault.code == code, fault
        return fault.reason

    def make_hello(self, session: str | None = None, generation: int = 1, step: int = 0) -> Hello:
        return Hello(
            digest=self._manifest.digest,
            session=self.session if session is None else session,
            generation=generation,
            step=step,
            wires=list_wires(self._manifest),
        )

    def ask_raw(self, content: bytes) -> bytes:
        """Send bytes, give the bytes of the answer."""
        self._transport.send([content])
        return bytes(self._transport.receive())

    def greet(self, session: str | None = None, generation: int = 1, step: int = 0) -> None:
        """Take up a session, a new one unless named."""
        answer, _ = self.ask(self.make_hello(session, generation, step))
        assert isinstance(answer, Welcome), answer
        self.session = answer.session

    def make_task(self, step: int = 0, turn: int = 0, session: str | None = None) -> Tensors:
        return Tensors(
            session=session or self.session,
            phase="train",
            step=step,
            micro_batch=0,
            turn=turn,
            seed=0,
            learning_rate=1e-3,
        )

    def forge(self, tensors: dict[str, object], body: bytes = b"", pad: int = 0) -> bytes:
        """Write a message of a task whose header is made by hand."""
        (plain,) = encode_message(self.make_task())
        (size,) = struct.unpack("<Q", plain[:8])
        header = json.loads(bytes(plain[8 : 8 + size]))
        text = json.dumps({**header, **tensors}).encode() + b" " * pad
        text += b" " * (-(len(text) + 8) % 64)
        return struct.pack("<Q", len(text)) + text + body


@contextmanager
def many_files(count: int) -> Iterator[None]:
    """Allow this process so many open files while the context lasts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def expect_undisturbed(arena: Arena) -> None:
    """End the honest client's training; its weights are those of a run that nobody disturbed."""
    arena.expect_progress()
    arena.finish()
    assert arena.connections == 1
    assert "Traceback" not in arena.log
    for token in arena.tokens.values():
        assert token not in arena.log
    print(
        f"honest steps meanwhile: {arena.steps}; server's memory in the end "
        f"{arena.resident_mib:.0f} MiB"
    )
    for name, array in arena.train_undisturbed().items():
        np.testing.assert_array_equal(arena.weights[name], array)
