"""A worker's process: what it holds, what it answers, and when it ends."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.manifests import encode_manifest
from splitonnx.messages import TaskKey
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.workers.blocks import SharedTensors, make_block, put, take
from splitonnx.runtime.workers.main import Host
from splitonnx.runtime.workers.messages import (
    Action,
    Begin,
    Continue,
    Done,
    Failed,
    Fetch,
    Finish,
    FromWorker,
    Given,
    Open,
    Request,
    Start,
    Tidy,
    Work,
    fill_slots,
    read_frame,
    write_frame,
)
from tests.end_to_end.test_stopping import LARGE, count_bytes_up, serve
from tests.support import tiny
from tests.support.clinics import DATA, needs_linux, open_clinic
from tests.support.endless import endless_bundle
from tests.support.waits import SECONDS, skip_to, wait_for
from tests.support.zoo import ZOO


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


@needs_linux
def test_a_worker_has_no_secret_no_socket_and_leaves_no_core(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITONNX_TOKEN", "a secret")
    with open_clinic(bundle.server, tmp_path) as clinic:
        with Client(
            bundle.client, clinic.server.url, credentials=clinic.credentials("ana")
        ) as client:
            client.step({name: array[:8] for name, array in DATA.items()})
        process = Path("/proc", str(clinic.worker("ana").pid))
        assert b"secret" not in (process / "environ").read_bytes()
        opened = _find_files(process)
        assert not [name for name in opened if "tokens" in name]
        here = {name for name in _find_files(Path("/proc/self")) if name.startswith("socket:")}
        assert here  # the server is in this process
        assert not here & opened
        core, data = _find_limits((process / "limits").read_text())
        assert core == "0"
        assert data != "unlimited"


def _find_files(process: Path) -> set[str]:
    found = set()
    for path in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # it was that of the folder itself
            found.add(os.readlink(path))
    return found


def _find_limits(text: str) -> tuple[str, str]:
    lines = {line[:25].strip(): line[25:].split()[0] for line in text.splitlines()}
    return lines["Max core file size"], lines["Max data size"]


@needs_linux
def test_a_worker_ends_with_its_server_even_within_a_stage(tmp_path: Path) -> None:
    made = endless_bundle()
    made.save(tmp_path / "bundle")

    def train(url: str) -> None:
        with pytest.raises(Exception), Client(made.client, url, give_up_after=0) as client:  # noqa: B017, PT011
            client.step(LARGE)

    with serve(tmp_path / "bundle" / "server", "--isolate") as (process, url):
        thread = threading.Thread(target=train, args=(url,))
        thread.start()
        children = wait_for(lambda: _find_children(process.pid))
        watched = [os.pidfd_open(child) for child in children]
        process.kill()
        process.wait()
        thread.join()
    for descriptor in watched:
        ended, _, _ = select.select([descriptor], [], [], SECONDS)  # once the process has ended
        assert ended
        os.close(descriptor)


def _find_children(pid: int) -> list[int]:
    text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(word) for word in text.split()]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of its own")
def test_a_second_signal_ends_a_step_in_a_worker(tmp_path: Path) -> None:
    made = endless_bundle()
    made.save(tmp_path / "bundle")

    def train(url: str) -> None:
        with pytest.raises(Exception), Client(made.client, url, give_up_after=0) as client:  # noqa: B017, PT011
            client.step(LARGE)

    with serve(tmp_path / "bundle" / "server", "--isolate") as (process, url):
        assert process.stderr is not None
        thread = threading.Thread(target=train, args=(url,))
        thread.start()
        wait_for(lambda: count_bytes_up(url) >= LARGE["x"].nbytes)
        process.send_signal(signal.SIGTERM)
        skip_to(process.stderr, "stopping: ")
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
        thread.join()
    assert "stopped" in rest.splitlines()[-1]


# --- what a worker answers, in this process ---------------------------------------------------


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Keep this process's own way with Ctrl-C, which a worker sets as it needs it."""
    kept = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, kept)


class Server:
    """The other end of a worker's pipes: all requests are written before the worker reads any."""

    def __init__(self) -> None:
        self.inbox, self.outbox = make_block(), make_block()
        for block in (self.inbox, self.outbox):
            block.reserve(1 << 16)
        self.requests = io.BytesIO()

    def ask(
        self, action: Action, tensors: dict[str, np.ndarray] | None = None, **more: Any
    ) -> None:
        """Write a request; its tensors are put into the block now, so one of them has some."""
        if tensors is not None:
            action = fill_slots(action, put(self.inbox, tensors))
        request = Request(
            inbox=self.inbox.place,
            outbox=self.outbox.place,
            action=action,
            kept_bytes=1 << 20,
            **more,
        )
        write_frame(self.requests, request)

    def hear(self) -> list[FromWorker]:
        """Let the worker answer all requests, and end at the end of them."""
        answers, decoder = io.BytesIO(), msgspec.msgpack.Decoder(FromWorker)
        self.requests.seek(0)
        Host(self.requests, answers).serve()
        answers.seek(0)
        heard = []
        while answers.tell() < len(answers.getvalue()):
            heard.append(decoder.decode(read_frame(answers)))
        return heard

    def start(self) -> None:
        party = tiny.split_bundle().parties["server"]
        shared = SharedTensors.make(dict(party.weights))
        assert shared is not None
        self.shared = shared
        self.ask(
            Start(
                manifest=encode_manifest(party.manifest),
                graphs=dict(party.graphs),
                file=shared.number,
                weights=shared.slots,
                threads=1,
                provider="cpu",
                stage_seconds=60.0,
                memory_bytes=None,
            )
        )


@pytest.fixture
def other_end(interrupts: None) -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.shared.close()
    server.inbox.close()
    server.outbox.close()


KEY = TaskKey("a" * 32, "train", 0, 0)
WIRES = {"h": np.ones((2, 4), np.float32), "labels": np.zeros((2, 2), np.float32)}


def work(session: int = 1) -> Work:
    return Work(session=session, key=KEY, begin=Begin(seed=0, learning_rate=0.5), wires=())


@needs_linux
def test_a_step_is_made_as_numpy_makes_it(other_end: Server) -> None:
    other_end.ask(Open(session=1, step=0, state=None))
    other_end.ask(work(), WIRES)
    other_end.ask(Continue(session=1, key=KEY))
    other_end.ask(Finish(session=1, key=KEY))
    other_end.ask(Fetch(session=1))
    started, opened, wires, done, finished, state = other_end.hear()
    assert [started, opened, finished] == [Done()] * 3
    assert done == Done(is_finished=True)
    assert isinstance(wires, Given)
    assert isinstance(state, Given)
    assert {slot.name for slot in wires.tensors} == {"h.grad", "loss"}
    found = take(other_end.outbox, state.tensors)
    y = WIRES["h"] @ tiny.WEIGHTS["W2"]
    gradient = WIRES["h"].T @ (2 * y / y.size)
    np.testing.assert_allclose(found["W2"], tiny.WEIGHTS["W2"] - 0.5 * gradient, rtol=1e-5)


@needs_linux
def test_sessions_are_apart_and_one_that_was_closed_is_gone(other_end: Server) -> None:
    other_end.ask(Open(session=1, step=0, state=None))
    other_end.ask(Open(session=2, step=0, state=None))
    other_end.ask(Fetch(session=2), closed=(1,))
    other_end.ask(Fetch(session=1))
    with pytest.raises(KeyError):
        other_end.hear()


@needs_linux
def test_a_task_that_was_given_up_may_begin_again(other_end: Server) -> None:
    other_end.ask(Open(session=1, step=0, state=None))
    other_end.ask(work(), WIRES)
    other_end.ask(Tidy(), abandoned=((1, KEY),))
    other_end.ask(work(), WIRES)
    other_end.ask(Fetch(session=1))
    *_, again, state = other_end.hear()
    assert isinstance(again, Given)
    assert isinstance(state, Given)
    np.testing.assert_array_equal(take(other_end.outbox, state.tensors)["W2"], tiny.WEIGHTS["W2"])


@needs_linux
def test_an_error_of_a_stage_is_an_answer_and_the_worker_goes_on(other_end: Server) -> None:
    other_end.ask(Open(session=1, step=0, state=None))
    other_end.ask(work(), {"h": np.ones((2, 5), np.float32)})
    other_end.ask(Tidy())
    *_, failed, tidied = other_end.hear()
    assert isinstance(failed, Failed)
    assert failed.code == "ArrayMismatch"
    assert tidied == Done()


@needs_linux
def test_a_worker_whose_server_is_gone_ends(other_end: Server) -> None:
    assert other_end.hear() == [Done()]
