"""The server over real websockets, and its sessions without."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from websockets.sync.client import connect as connect_websocket

from splitonnx.bundles import Bundle
from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, ServerBusy
from splitonnx.messages import (
    Bye,
    Fault,
    Hello,
    Message,
    Save,
    Saved,
    Tensors,
    Unsaved,
    Welcome,
    decode_message,
)
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.websockets import WebSocketTransport, connect
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.wire.fragments import FRAGMENT
from splitonnx.runtime.wire.protocols import CLIENT, Protocol, State, list_wires
from tests.support.zoo import ZOO

DATA = ZOO["chain"].data(24)
SESSION = "0123456789abcdef" * 2


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
                return receive()

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


def test_a_connection_that_is_stuck_does_not_keep_the_next_one_waiting() -> None:
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
        stuck.send(protocol.send(task, activation))
        next(iter(stuck._socket.recv_streaming(decode=False)))  # the reply has begun
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


# --- sessions -------------------------------------------------------------------------------


class Caller:
    """A client by hand: it says what it is told to and hears every reply."""

    def __init__(
        self,
        bundle: Bundle,
        registry: Registry | None = None,
        *,
        session: str = SESSION,
        generation: int = 1,
        owner: str = "",
        norm: float | None = None,
    ) -> None:
        assert bundle.server is not None
        self.manifest = bundle.client.manifest
        registry = registry or Registry(Executor(bundle.server, Engine(threads=1)))
        self.dispatcher = Dispatcher(registry, owner, norm=norm)
        self._protocol = Protocol(self.manifest, CLIENT)
        (self.greeting,) = self.say(
            Hello(
                digest=self.manifest.digest,
                session=session,
                generation=generation,
                step=0,
                wires=list_wires(self.manifest),
            )
        )

    def say(self, message: Message, wires: dict[str, np.ndarray] | None = None) -> list[Message]:
        content = b"".join(self._protocol.send(message, wires))
        return [self._hear(reply) for reply in self.dispatcher.handle(content)]

    def _hear(self, reply: list[Chunk]) -> Message:
        message, self.tensors = self._protocol.receive(b"".join(reply))
        return message

    @property
    def step(self) -> int:
        assert self.dispatcher.session is not None
        return self.dispatcher.session.executor.step


ACTIVATION = {"act1@server": np.ones((2, 7), np.float32)}
GRADIENT = {"act3@client_grad": np.ones((2, 6), np.float32)}


def make_task(session: str = SESSION, step: int = 0, turn: int = 0) -> Tensors:
    return Tensors(
        session=session,
        phase="train",
        step=step,
        micro_batch=0,
        turn=turn,
        seed=0,
        learning_rate=1e-3,
    )


def expect_fault(replies: list[Message], code: str, reason: str) -> None:
    (fault,) = replies
    assert isinstance(fault, Fault)
    assert fault.code == code
    assert reason in fault.reason


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (make_task("f" * 32), "session"),
        (make_task(step=1), "step 1"),
        (make_task(turn=1), "message 1 of step 0"),
    ],
)
def test_a_task_of_another_session_step_or_turn_is_refused(
    bundle: Bundle, task: Tensors, reason: str
) -> None:
    caller = Caller(bundle)
    expect_fault(caller.say(task, ACTIVATION), "RemoteProtocolError", reason)
    assert caller.dispatcher.is_closed
    assert caller.step == 0


def test_a_repeated_message_gets_the_same_reply_and_is_not_acted_on_again(bundle: Bundle) -> None:
    caller = Caller(bundle)
    (first,) = caller.say(make_task(), ACTIVATION)
    computed = caller.tensors
    assert caller.say(make_task(), ACTIVATION) == [first]
    assert all(caller.tensors[name] is not computed[name] for name in computed)
    for name, array in computed.items():
        np.testing.assert_array_equal(caller.tensors[name], array)
    (last,) = caller.say(make_task(turn=1), GRADIENT)
    assert caller.step == 1
    assert caller.say(make_task(turn=1), GRADIENT) == [last]
    assert caller.say(make_task(), ACTIVATION) == [first]
    assert caller.step == 1


def test_a_step_that_was_made_is_not_made_again_with_other_inputs(bundle: Bundle) -> None:
    caller = Caller(bundle)
    caller.say(make_task(), ACTIVATION)
    caller.say(make_task(turn=1), GRADIENT)
    other = {"act1@server": np.zeros((2, 7), np.float32)}
    expect_fault(caller.say(make_task(), other), "StepConflict", "step 0 was made already")
    assert caller.step == 1


def test_a_step_that_began_may_begin_again_on_another_connection_with_other_inputs(
    bundle: Bundle,
) -> None:
    assert bundle.server is not None
    registry = Registry(Executor(bundle.server, Engine(threads=1)))
    Caller(bundle, registry).say(make_task(), ACTIVATION)
    again = Caller(bundle, registry, generation=2)
    (reply,) = again.say(make_task(), {"act1@server": np.zeros((3, 7), np.float32)})
    assert isinstance(reply, Tensors)
    assert {array.shape for array in again.tensors.values()} == {(3, 6)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_before_the_step(
    bundle: Bundle, value: float
) -> None:
    caller = Caller(bundle)
    wrong = np.ones((2, 7), np.float32)
    wrong[1, 3] = value
    (fault,) = caller.say(make_task(), {"act1@server": wrong})
    assert isinstance(fault, Fault)
    assert (fault.code, fault.subject, fault.reason) == ("NotFinite", "act1@server", "step 1")
    assert caller.step == 0


def test_a_gradient_over_the_norm_limit_is_refused_before_the_step(bundle: Bundle) -> None:
    caller = Caller(bundle, norm=3.5)
    caller.say(make_task(), {"act1@server": np.full((2, 7), 100, np.float32)})
    assert len(caller.say(make_task(turn=1), GRADIENT)) == 1  # its norm is the root of 12
    caller.say(make_task(step=1), ACTIVATION)
    large = {"act3@client_grad": np.full((2, 6), 2, np.float32)}
    expect_fault(caller.say(make_task(step=1, turn=1), large), "NormTooLarge", "limit of 3.5")
    assert caller.step == 1


def test_an_older_connection_of_a_session_can_do_nothing(bundle: Bundle) -> None:
    assert bundle.server is not None
    registry = Registry(Executor(bundle.server, Engine(threads=1)))
    old = Caller(bundle, registry)
    new = Caller(bundle, registry, generation=2)
    expect_fault(old.say(make_task(), ACTIVATION), "StaleConnection", "replaced by connection 2")
    late = Caller(bundle, registry, generation=2)
    assert isinstance(late.greeting, Fault)
    assert (late.greeting.code, late.greeting.newest) == ("StaleConnection", 2)
    (reply,) = new.say(make_task(), ACTIVATION)
    assert isinstance(reply, Tensors)


def test_a_session_of_another_owner_is_refused(bundle: Bundle) -> None:
    assert bundle.server is not None
    registry = Registry(Executor(bundle.server, Engine(threads=1)))
    Caller(bundle, registry, owner="ann")
    other = Caller(bundle, registry, owner="bob", generation=2)
    expect_fault([other.greeting], "ForeignSession", "another token")


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 32, "0" * 33, "0" * 31 + "/"])
def test_a_session_is_named_by_hex_digits_and_nothing_else(bundle: Bundle, name: str) -> None:
    expect_fault([Caller(bundle, session=name).greeting], "RemoteProtocolError", "32 hexadecimal")


def test_a_full_server_says_so_and_takes_the_next_when_one_leaves(bundle: Bundle) -> None:
    assert bundle.server is not None
    registry = Registry(Executor(bundle.server, Engine(threads=1)), sessions=1)
    first = Caller(bundle, registry)
    expect_fault([Caller(bundle, registry, session="a" * 32).greeting], "ServerBusy", "1 sessions")
    assert first.say(Bye()) == []
    assert isinstance(Caller(bundle, registry, session="b" * 32).greeting, Welcome)


def test_saving_in_memory_is_refused_and_saving_to_disk_is_answered(
    bundle: Bundle, tmp_path: Path
) -> None:
    (answer,) = Caller(bundle).say(Save(session=SESSION, step=0))
    assert isinstance(answer, Unsaved)
    assert "no folder" in answer.reason
    bundle.save(tmp_path / "bundle")
    caller = Caller(Bundle.load(tmp_path / "bundle"))
    assert caller.say(Save(session=SESSION, step=0)) == [Saved(session=SESSION, step=0)]
    assert not (tmp_path / "bundle" / "server" / "state.safetensors").exists()
    caller.say(Save(session=SESSION, step=0, publish=True))
    assert (tmp_path / "bundle" / "server" / "state.safetensors").exists()


def test_a_session_for_which_there_is_no_room_just_now_is_interrupted_and_not_refused(
    bundle: Bundle,
) -> None:
    """Told so, its client would end its training."""
    dispatcher = Caller(bundle).dispatcher
    assert [*dispatcher.refuse(ServerBusy("memory"))] == []
    assert dispatcher.is_interrupted
    assert dispatcher.is_closed


def test_good_bye_ends_a_conversation_without_a_word(bundle: Bundle) -> None:
    caller = Caller(bundle)
    assert caller.say(Bye()) == []
    assert caller.dispatcher.is_closed
