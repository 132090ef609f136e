"""The transport in memory: what it carries, and when the server works."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import ConnectionLost, LocalProtocolError
from splitonnx.messages import Hello, Message, Tensors, Welcome, decode_message, encode_message
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import MemoryTransport, connect_in_memory
from splitonnx.runtime.wire.protocols import list_wires
from tests.support import tiny

SESSION = "5" * 32
BUNDLE = tiny.split_bundle()


@pytest.fixture
def transport() -> MemoryTransport:
    assert BUNDLE.server is not None
    return connect_in_memory(Executor(BUNDLE.server, Engine(threads=1)))


def greet(transport: MemoryTransport) -> Message:
    manifest = BUNDLE.client.manifest
    hello = Hello(
        digest=manifest.digest,
        session=SESSION,
        generation=1,
        step=0,
        wires=list_wires(manifest),
    )
    transport.send(encode_message(hello))
    return decode_message(transport.receive())[0]


def send_step(transport: MemoryTransport) -> None:
    task = Tensors(
        session=SESSION,
        phase="train",
        step=0,
        micro_batch=0,
        turn=0,
        seed=0,
        learning_rate=tiny.RATE,
    )
    wires = {"h": np.ones((2, 4), np.float32), "labels": np.zeros((2, 2), np.float32)}
    transport.send(encode_message(task, wires))


def test_a_greeting_is_answered_and_whole_messages_are_counted(transport: MemoryTransport) -> None:
    welcome = greet(transport)
    assert isinstance(welcome, Welcome)
    assert transport.bytes_received == len(b"".join(encode_message(welcome)))
    assert transport.bytes_sent > 100


def test_the_server_s_update_runs_after_its_reply_and_before_the_next_message(
    transport: MemoryTransport,
) -> None:
    greet(transport)
    send_step(transport)
    assert transport.executor.step == 0
    gradient, _ = decode_message(transport.receive())
    assert isinstance(gradient, Tensors)
    assert transport.executor.step == 0
    transport.drain()
    assert transport.executor.step == 1


def test_replies_that_came_while_draining_are_kept_in_order(transport: MemoryTransport) -> None:
    greet(transport)
    send_step(transport)
    transport.drain()
    assert isinstance(decode_message(transport.receive())[0], Tensors)
    with pytest.raises(ConnectionLost):
        transport.receive()


def test_the_executor_is_that_of_the_session_and_leaves_the_given_one_alone() -> None:
    assert BUNDLE.server is not None
    given = Executor(BUNDLE.server, Engine(threads=1))
    transport = connect_in_memory(given)
    with pytest.raises(LocalProtocolError):
        _ = transport.executor
    greet(transport)
    send_step(transport)
    transport.drain()
    assert (transport.executor.step, given.step) == (1, 0)
    np.testing.assert_array_equal(given.state()["W2"], tiny.WEIGHTS["W2"])


def test_closing_finishes_the_work_and_lets_go_of_the_session_once(
    transport: MemoryTransport,
) -> None:
    greet(transport)
    executor = transport.executor
    send_step(transport)
    transport.close()
    transport.close()
    assert executor.step == 1
    with pytest.raises(ConnectionLost, match="closed"):
        transport.send([b"anything"])


def test_without_a_message_there_is_no_reply(transport: MemoryTransport) -> None:
    with pytest.raises(ConnectionLost):
        transport.receive()
