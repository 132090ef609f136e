"""The server over real websockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from websockets.protocol import Event
from websockets.sync.client import connect as connect_websocket

from splitonnx.bundles import Bundle
from splitonnx.errors import ConnectionLost
from splitonnx.messages import Fault, Hello, Welcome, decode_message
from splitonnx.names import CLIENT
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.websockets import WebSocketTransport, connect
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.wire.fragments import FRAGMENT
from splitonnx.runtime.wire.protocols import Protocol, State, list_wires
from tests.support.callers import SESSION, make_task
from tests.support.echoes import PATIENCE
from tests.support.event_loops import ON_BOTH_LOOPS
from tests.support.zoo import ZOO

pytestmark = ON_BOTH_LOOPS

DATA = ZOO["chain"].data(24)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


@pytest.fixture
def server(bundle: Bundle) -> Iterator[Server]:
    assert bundle.server is not None
    with Server(bundle.server, port=0) as running:
        yield running


def train_in_memory(bundle: Bundle) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine()))
    with Client(bundle.client, link) as client:
        client.fit(DATA, batch_size=8)
        link.drain()
        return client.state(), link.executor.state()


def test_training_over_a_websocket_is_training_in_memory(bundle: Bundle, server: Server) -> None:
    expected, _ = train_in_memory(bundle)
    with Client(bundle.client, server.url) as client:
        history = client.fit(DATA, batch_size=8)
        for name, array in client.state().items():
            np.testing.assert_array_equal(array, expected[name])
    assert [record.step for record in history.steps] == [1, 2, 3]
    assert all(record.bytes_up > 8 * 7 * 4 for record in history.steps)
    assert all(record.bytes_down > 8 * 6 * 4 for record in history.steps)


def test_several_clients_train_at_once_each_its_own_copy(bundle: Bundle, server: Server) -> None:
    expected, _ = train_in_memory(bundle)
    with Client(bundle.client, server.url) as first, Client(bundle.client, server.url) as second:
        second.step(DATA)
        first.fit(DATA, batch_size=8)
        assert first.session != second.session
        assert (first.steps, second.steps) == (3, 1)
        for name, array in first.state().items():
            np.testing.assert_array_equal(array, expected[name])


def test_the_next_client_begins_anew(bundle: Bundle, server: Server) -> None:
    with Client(bundle.client, server.url) as client:
        first = client.step(DATA)["loss"]
    with Client(bundle.client, server.url) as client:
        assert client.step(DATA)["loss"] == first


def test_a_client_that_vanishes_within_a_step_goes_on_with_it(
    bundle: Bundle, server: Server
) -> None:
    expected, _ = train_in_memory(bundle)
    cut_off: list[WebSocketTransport] = []

    def dial() -> WebSocketTransport:
        transport = connect(server.url)
        if len(cut_off) < 4:
            cut_off.append(transport)
            receive, left = transport.receive, iter(range(len(cut_off)))

            def receive_some() -> bytes:
                if next(left, None) is None:
                    transport.close()
                return bytes(receive())

            transport.receive = receive_some  # type: ignore[method-assign]
        return transport

    with Client(bundle.client, dial) as client:
        client.fit(DATA, batch_size=8)
        for name, array in client.state().items():
            np.testing.assert_array_equal(array, expected[name])
    assert len(cut_off) == 4


def test_messages_larger_than_a_fragment_arrive_whole() -> None:
    zoo_model = ZOO["mse"]
    bundle = cut(zoo_model.build(), at="act0", loss="mse")
    assert bundle.server is not None
    rows = FRAGMENT // 4 // 6 * 2 + 1
    data = zoo_model.data(rows)
    large = Server(bundle.server, port=0, limits=Limits(batch=rows))
    with large as server, Client(bundle.client, server.url) as client:
        (predicted,) = client.predict({"x": data["x"]}, batch_size=rows).values()
    link = connect_in_memory(Executor(bundle.server, Engine()))
    with Client(bundle.client, link) as client:
        (expected,) = client.predict({"x": data["x"]}, batch_size=rows).values()
    np.testing.assert_array_equal(predicted, expected)


def test_a_connection_that_is_stuck_does_not_keep_the_next_one_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first client reads nothing, so the server cannot get rid of its reply."""
    bundle = cut(ZOO["mse"].build(), at="act0", loss="mse")
    assert bundle.server is not None
    manifest = bundle.client.manifest
    wires = list_wires(manifest)
    (up,) = [wire.tensor for wire in wires["predict"] if wire.sender == CLIENT]
    rows = 32 * FRAGMENT // 4  # some 100 MiB to answer with, more than buffers take
    activation = {up.name: np.zeros((rows, *map(int, up.shape[1:])), np.float32)}  # type: ignore[arg-type]

    def say_hello(transport: WebSocketTransport, generation: int) -> Protocol:
        protocol = Protocol(manifest, CLIENT)
        hello = Hello(
            digest=manifest.digest, session=SESSION, generation=generation, step=0, wires=wires
        )
        transport.send(protocol.send(hello))
        return protocol

    limits = Limits(message_bytes=1 << 30, batch=rows)
    with Server(bundle.server, port=0, limits=limits) as server:
        stuck = connect(server.url)
        protocol = say_hello(stuck, 1)
        stuck.receive()
        protocol.state = State.OPEN
        task = msgspec.structs.replace(make_task(), phase="predict")
        begun, process = threading.Event(), stuck._socket.process_event

        def note(event: Event) -> None:
            process(event)
            begun.set()

        monkeypatch.setattr(stuck._socket, "process_event", note)
        stuck.send(protocol.send(task, activation))
        assert begun.wait(PATIENCE)  # the reply has begun
        impatient = WebSocketTransport(server.url, reply_seconds=15)
        protocol = say_hello(impatient, 2)
        assert isinstance(protocol.receive(impatient.receive())[0], Welcome)
        impatient.close()
        stuck.close()


def test_what_is_no_message_ends_the_connection_with_a_fault(server: Server) -> None:
    for content in (b"", b"hello", bytes(100)):
        with connect_websocket(server.url, compression=None) as socket:
            socket.send(content)
            fault, _ = decode_message(socket.recv(timeout=30, decode=False))
        assert isinstance(fault, Fault)
        assert fault.code == "RemoteProtocolError"


def test_text_frames_are_refused_too(server: Server, bundle: Bundle) -> None:
    with connect_websocket(server.url, compression=None) as socket:
        socket.send("hello")
        fault, _ = decode_message(socket.recv(timeout=30, decode=False))
    assert isinstance(fault, Fault)
    with Client(bundle.client, server.url) as client:
        client.step(DATA)


def test_closing_the_server_ends_its_threads(bundle: Bundle) -> None:
    assert bundle.server is not None
    before = set(threading.enumerate())
    server = Server(bundle.server, port=0)
    with server:
        url = server.url
        with Client(bundle.client, url) as client:
            client.step(DATA)
    server.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(ConnectionLost):
        connect(url)
