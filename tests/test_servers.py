"""The server over real websockets, and its sessions without."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from websockets.sync.client import connect as connect_websocket

from splitonnx.bundles import Bundle
from splitonnx.errors import ConnectionLost, RemoteFault, ServerBusy, UsageError
from splitonnx.messages import Bye, Fault, Hello, Save, Saved, Tensors, Welcome, decode_message
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.clients import Client
from splitonnx.runtime.engines import Engine
from splitonnx.runtime.executors import Executor
from splitonnx.runtime.protocols import CLIENT, Protocol, list_wires
from splitonnx.runtime.servers import Server
from splitonnx.runtime.sessions import Session
from splitonnx.runtime.sockets import FRAGMENT, connect
from splitonnx.runtime.transports import MemoryTransport
from tests.zoo import ZOO

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
    executor = Executor(bundle.server, Engine())
    link = MemoryTransport(Session(executor))
    with Client(bundle.client, link) as client:
        client.fit(DATA, batch_size=8)
        link.drain()
        return client.state(), executor.state()


def test_training_over_a_websocket_is_training_in_memory(bundle: Bundle, server: Server) -> None:
    expected, _ = train_in_memory(bundle)
    with Client(bundle.client, server.url) as client:
        history = client.fit(DATA, batch_size=8)
        for name, array in client.state().items():
            np.testing.assert_array_equal(array, expected[name])
    assert [record.step for record in history.steps] == [1, 2, 3]
    assert all(record.bytes_up > 8 * 7 * 4 for record in history.steps)
    assert all(record.bytes_down > 8 * 6 * 4 for record in history.steps)


def test_a_second_client_is_told_that_the_server_is_busy(bundle: Bundle, server: Server) -> None:
    with Client(bundle.client, server.url) as first:
        with pytest.raises(ServerBusy, match="busy with another client"):
            Client(bundle.client, server.url)
        first.step(DATA)


def test_the_next_client_finds_the_state_that_the_last_one_left(
    bundle: Bundle, server: Server
) -> None:
    with Client(bundle.client, server.url) as client:
        client.step(DATA)
    with pytest.raises(RemoteFault, match="restart the server"):
        Client(bundle.client, server.url)


def test_a_client_that_vanishes_within_a_step_leaves_the_last_whole_step(
    bundle: Bundle, server: Server
) -> None:
    manifest = bundle.client.manifest
    transport, protocol = connect(server.url), Protocol(manifest, CLIENT)
    transport.send(protocol.send(Hello(digest=manifest.digest, step=0, wires=list_wires(manifest))))
    welcome, _ = protocol.receive(transport.receive())
    assert isinstance(welcome, Welcome)
    task = Tensors(
        session=welcome.session, phase="train", step=0, micro_batch=0, seed=0, learning_rate=1e-3
    )
    transport.send(protocol.send(task, {"act1@server": np.ones((4, 7), np.float32)}))
    reply, tensors = protocol.receive(transport.receive())
    assert isinstance(reply, Tensors)
    assert tensors["act3@client"].shape == (4, 6)
    transport.close()  # before the gradient that the server waits for
    with connect_when_free(bundle, server) as client:
        client.fit(DATA, batch_size=8)
        assert client.steps == 3


def connect_when_free(bundle: Bundle, server: Server) -> Client:
    """The server notices a lost client a moment later; nothing tells when but trying."""
    for _ in range(1000):
        try:
            return Client(bundle.client, server.url)
        except ServerBusy:
            continue
    raise AssertionError("the server stays busy")


def test_messages_larger_than_a_fragment_arrive_whole() -> None:
    zoo_model = ZOO["mse"]
    bundle = cut(zoo_model.build(), at="act0", loss="mse")
    assert bundle.server is not None
    rows = FRAGMENT // 4 // 6 * 2 + 1
    data = zoo_model.data(rows)
    with Server(bundle.server, port=0) as server, Client(bundle.client, server.url) as client:
        (predicted,) = client.predict({"x": data["x"]}, batch_size=rows).values()
    link = MemoryTransport(Session(Executor(bundle.server, Engine())))
    with Client(bundle.client, link) as client:
        (expected,) = client.predict({"x": data["x"]}, batch_size=rows).values()
    np.testing.assert_array_equal(predicted, expected)


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
    with connect_when_free(bundle, server) as client:
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


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="no websocket address"):
        connect("http://127.0.0.1:1")


# --- sessions -------------------------------------------------------------------------------


def open_session(bundle: Bundle) -> tuple[Session, Protocol, str]:
    assert bundle.server is not None
    session = Session(Executor(bundle.server, Engine(threads=1)))
    manifest = bundle.client.manifest
    protocol = Protocol(manifest, CLIENT)
    hello = Hello(digest=manifest.digest, step=0, wires=list_wires(manifest))
    (reply,) = session.handle(b"".join(protocol.send(hello)))
    welcome, _ = protocol.receive(b"".join(reply))
    assert isinstance(welcome, Welcome)
    return session, protocol, welcome.session


def ask(
    session: Session,
    protocol: Protocol,
    message: Tensors | Save,
    wires: dict[str, np.ndarray] | None = None,
) -> object:
    replies = list(session.handle(b"".join(protocol.send(message, wires))))
    return decode_message(b"".join(replies[0]))[0]


def make_task(session: str, step: int = 0) -> Tensors:
    return Tensors(
        session=session, phase="train", step=step, micro_batch=0, seed=0, learning_rate=1e-3
    )


@pytest.mark.parametrize(("other", "step", "reason"), [(True, 0, "session"), (False, 1, "step 1")])
def test_a_task_of_another_session_or_step_is_refused(
    bundle: Bundle, other: bool, step: int, reason: str
) -> None:
    session, protocol, name = open_session(bundle)
    task = make_task("someone else" if other else name, step)
    fault = ask(session, protocol, task, {"act1@server": np.ones((2, 7), np.float32)})
    assert isinstance(fault, Fault)
    assert reason in fault.reason
    assert session.is_closed
    assert session.executor.step == 0


def test_saving_in_memory_is_a_fault_and_saving_to_disk_is_answered(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    session, protocol, name = open_session(bundle)
    assert isinstance(ask(session, protocol, Save(session=name, step=0)), Fault)
    folder = tmp_path_factory.mktemp("saved") / "bundle"
    bundle.save(folder)
    session, protocol, name = open_session(Bundle.load(folder))
    assert ask(session, protocol, Save(session=name, step=0)) == Saved(session=name, step=0)
    assert (folder / "server" / "state.safetensors").exists()


def test_good_bye_ends_a_session_without_a_word(bundle: Bundle) -> None:
    session, protocol, _ = open_session(bundle)
    assert list(session.handle(b"".join(protocol.send(Bye())))) == []
    assert session.is_closed
