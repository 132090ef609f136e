"""What one client's messages cost the others and the server: rows, memory, turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import BatchTooLarge, ConnectionLost, TaskTooLarge
from splitonnx.messages import Hello, Message, Tensors, Welcome, decode_message, encode_message
from splitonnx.names import SERVER
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.websockets import connect
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.estimates import FIXED, Estimates
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.scheduling import budgets
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.wire.protocols import Protocol, State, list_wires
from splitonnx.runtime.wire.transports import Transport
from tests.support.arenas import FORWARD, MIB, Arena, Attacker
from tests.support.echoes import PATIENCE
from tests.support.zoo import ZOO

GREEDY = 16
"""Connections of the greedy owner."""
STEPS = 20
"""The honest client's steps during which the greedy one's messages are counted."""
MOST = 20
"""Messages of the greedy owner to one step.  Before each of its six pieces of work at most two
others run, and some while the client itself computes: 8 to 10.  Without turns it is 36."""


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    arena = Arena(tmp_path_factory.mktemp("arena"), "--max-sessions-per-token", GREEDY + 2)
    yield arena
    arena.close()


@pytest.fixture
def eve(arena: Arena) -> Iterator[Attacker]:
    with Attacker(arena) as attacker:
        attacker.greet()
        yield attacker


@pytest.mark.parametrize("phase", ["train", "predict"])
def test_more_rows_than_the_limit_are_refused_before_anything_runs(
    arena: Arena, eve: Attacker, phase: str
) -> None:
    task = msgspec.structs.replace(eve.make_task(), phase=phase)
    rows = Limits.batch + 1
    reason = eve.expect_fault("BatchTooLarge", task, {FORWARD: np.ones((rows, 7), np.float32)})
    assert f"{rows} rows" in reason
    assert "--batch-size" in reason


def test_as_many_rows_as_the_limit_are_taken(arena: Arena, eve: Attacker) -> None:
    wave = np.ones((Limits.batch, 7), np.float32)
    task = msgspec.structs.replace(eve.make_task(), phase="predict")
    assert isinstance(eve.ask(task, {FORWARD: wave})[0], Tensors)


def test_a_client_is_told_of_its_batch_in_the_server_s_words(arena: Arena) -> None:
    rows = Limits.batch + 1
    data = ZOO["chain"].data(rows)
    with (
        Client(arena.bundle.client, arena.url, credentials=arena.credentials("eve")) as client,
        pytest.raises(BatchTooLarge) as caught,
    ):
        client.step(data)
    assert (caught.value.rows, caught.value.limit) == (rows, Limits.batch)
    assert "\n" not in str(caught.value)


def test_a_first_dimension_that_the_model_fixes_is_no_batch(arena: Arena) -> None:
    manifest = arena.bundle.server.manifest  # type: ignore[union-attr]
    (phase,) = (phase for phase in manifest.phases if phase.name == "predict")
    wires = tuple(
        msgspec.structs.replace(w, tensor=msgspec.structs.replace(w.tensor, shape=(9, 7)))
        if w.tensor.name == FORWARD
        else w
        for w in phase.wires
    )
    fixed = msgspec.structs.replace(manifest, phases=(msgspec.structs.replace(phase, wires=wires),))
    task = Tensors(
        session="0" * 32, phase="predict", step=0, micro_batch=0, turn=0, seed=0, learning_rate=0
    )
    sender = Protocol(fixed, "client")
    receiver = Protocol(fixed, SERVER, batch=4)
    sender.state = receiver.state = State.OPEN
    content = b"".join(sender.send(task, {FORWARD: np.ones((9, 7), np.float32)}))
    assert receiver.receive(content)[0] == task


def test_a_greedy_owner_s_many_connections_do_not_multiply_its_turns(arena: Arena) -> None:
    served = [0] * GREEDY
    done = threading.Event()

    def ask(place: int) -> None:
        with Attacker(arena) as greedy:
            greedy.greet()
            task = msgspec.structs.replace(greedy.make_task(), phase="predict")
            chunks = encode_message(task, {FORWARD: np.ones((Limits.batch, 7), np.float32)})
            content = b"".join(chunks)
            while not done.is_set():
                greedy.ask_raw(content)
                served[place] += 1

    def advance(steps: int) -> None:
        aim = arena.steps + steps
        with arena._advanced:
            assert arena._advanced.wait_for(lambda: arena.steps >= aim, PATIENCE)

    with ExitStack() as stack:
        threads = [threading.Thread(target=ask, args=(place,)) for place in range(GREEDY)]
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(done.set)
        while min(served) == 0:
            assert all(thread.is_alive() for thread in threads)
            advance(1)
        before = sum(served)
        advance(STEPS)
        assert sum(served) - before <= MOST * STEPS


ROWS = 16 * MIB // 28
"""Of the wire that begins a step, in a message of 16 MiB."""


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


@pytest.fixture(scope="module")
def estimates(bundle: Bundle) -> Estimates:
    assert bundle.server is not None
    return Estimates(bundle.server.manifest, bundle.server.graphs)


def test_a_task_over_the_limit_takes_no_memory_but_its_message_s(tmp_path: Path) -> None:
    arena = Arena(tmp_path, "--max-batch", 10 * ROWS, "--max-task-bytes", 32 * MIB)
    try:
        with Attacker(arena) as eve:
            eve.greet()
            arena.expect_progress()
            before = arena.resident_mib
            arena.forget_peak()
            wave = {FORWARD: np.zeros((ROWS, 7), np.float32)}
            assert "MiB of memory" in eve.expect_fault("TaskTooLarge", eve.make_task(), wave)
            assert arena.peak_mib - before < 48
        arena.expect_progress()
    finally:
        arena.close()


def test_a_client_is_told_that_its_task_is_too_large(bundle: Bundle) -> None:
    assert bundle.server is not None
    server = Server(bundle.server, port=0, limits=Limits(task_bytes=2 * FIXED))
    with server, Client(bundle.client, server.url) as client:
        client.step(ZOO["chain"].data(8))
        with pytest.raises(TaskTooLarge) as caught:
            client.step(ZOO["chain"].data(Limits.batch))
    assert caught.value.limit == 2 * FIXED < caught.value.needed
    assert "--batch-size" in str(caught.value)


class Visitor:
    """A client of its own words, without a token."""

    def __init__(self, bundle: Bundle, url: str, session: str) -> None:
        self._manifest = bundle.client.manifest
        self._session = session
        self._url = url
        self.transport: Transport = connect(url)

    def ask(self, message: Message, tensors: dict[str, np.ndarray] | None = None) -> Message:
        self.transport.send(encode_message(message, tensors))
        return decode_message(self.transport.receive())[0]

    def greet(self, generation: int) -> None:
        hello = Hello(
            digest=self._manifest.digest,
            session=self._session,
            generation=generation,
            step=0,
            wires=list_wires(self._manifest),
        )
        assert isinstance(self.ask(hello), Welcome)

    def begin(self) -> None:
        """Send the first message of a step, and hear its answer."""
        self.send("train")
        assert isinstance(decode_message(self.transport.receive())[0], Tensors)

    def send(self, phase: str) -> None:
        """Send the first message of a task."""
        task = Tensors(
            session=self._session,
            phase=phase,
            step=0,
            micro_batch=0,
            turn=0,
            seed=0,
            learning_rate=1e-3,
        )
        self.transport.send(encode_message(task, {FORWARD: np.ones((8, 7), np.float32)}))

    def come_back(self, generation: int) -> None:
        self.transport.close()
        self.transport = connect(self._url)
        self.greet(generation)


@pytest.fixture
def cramped(bundle: Bundle, estimates: Estimates, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with memory for one step, whose idle tasks may be given up at once."""
    assert bundle.server is not None
    monkeypatch.setattr(budgets, "IDLE_SECONDS", 0.0)
    needed = estimates.measure("train", {"N": 8})
    return Server(bundle.server, port=0, limits=Limits(task_bytes=needed * 3 // 2))


def test_an_open_step_whose_client_is_silent_makes_room_for_those_who_wait(
    bundle: Bundle, cramped: Server
) -> None:
    """Its client is sent away, and can begin the step again; without waiting it is left alone."""
    with cramped, Client(bundle.client, cramped.url) as honest:
        silent = Visitor(bundle, cramped.url, "1" * 32)
        silent.greet(1)
        silent.begin()
        honest.step(ZOO["chain"].data(8))  # there is room for one
        with pytest.raises(ConnectionLost) as caught:
            silent.transport.receive()
        assert caught.value.code == 1012  # come again
        silent.come_back(2)
        silent.begin()
        silent.transport.close()


def test_a_message_that_waits_for_memory_does_not_keep_what_its_own_session_holds(
    bundle: Bundle, cramped: Server
) -> None:
    with cramped, Client(bundle.client, cramped.url) as honest:
        greedy = Visitor(bundle, cramped.url, "2" * 32)
        greedy.greet(1)
        greedy.begin()
        greedy.send("predict")  # there is no room for it beside the step
        honest.step(ZOO["chain"].data(8))
        with pytest.raises(ConnectionLost) as caught:
            greedy.transport.receive()
        assert caught.value.code == 1012
        greedy.transport.close()
