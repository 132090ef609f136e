"""What one client's messages cost the others and the server: rows, memory, turns."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import numpy as np
import pytest

from splitonnx.errors import BatchTooLarge
from splitonnx.messages import Tensors, encode_message
from splitonnx.runtime.clients import Client
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.norms import check_values
from splitonnx.runtime.protocols import SERVER, Protocol, State
from tests.arenas import FORWARD, MIB, Arena, Attacker
from tests.echoes import PATIENCE
from tests.zoo import ZOO

GREEDY = 16
"""Connections of the greedy owner."""
STEPS = 20
"""The honest client's steps during which the greedy one's messages are counted."""
MOST = 20
"""Messages of the greedy owner to one step.  Before each of its six pieces of work at most two
others run, and some while the client itself computes: 8 to 10.  Without turns it is 36."""


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    arena = Arena(tmp_path_factory.mktemp("arena"))
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
        Client(arena.bundle.client, arena.url, access=arena.access("eve")) as client,
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


def test_looking_at_a_message_s_values_takes_no_memory_of_its_size() -> None:
    array = np.ones(64 * MIB // 4, np.float32)
    tracemalloc.start()
    try:
        check_values("x", array, "step 1", limit=1e9)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB


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
            advance(1)
        before = sum(served)
        advance(STEPS)
        assert sum(served) - before <= MOST * STEPS
