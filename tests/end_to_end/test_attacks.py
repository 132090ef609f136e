"""Attacks by what a message holds and by who sends it, while an honest client trains.

Each is refused by a server in its own process, and the honest client's weights end equal, bit for
bit, to those of a run that nobody disturbed.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, StaleConnection, Unauthorized
from splitonnx.messages import (
    MAX_HEADER,
    REPLACED,
    Fault,
    Login,
    Message,
    Save,
    Tensors,
    Welcome,
    decode_message,
    encode_message,
)
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.websockets import WebSocketTransport, connect
from splitonnx.runtime.client.clients import Client
from tests.support.arenas import DATA, FORWARD, MIB, Arena, Attacker, expect_undisturbed
from tests.support.echoes import (
    dial,
    shake,
)

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]

SECONDS = 1.0
"""The limits of time in these tests."""
WAVES = np.ones((4, 7), np.float32)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    running = Arena(
        tmp_path_factory.mktemp("arena"),
        "--max-handshake-seconds", SECONDS, "--max-login-seconds", SECONDS,
        "--max-message-seconds", SECONDS, "--max-message-bytes", 4 * MIB,
    )  # fmt: skip
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _unharmed(arena: Arena) -> Iterator[None]:
    """The honest client trains on after each attack, over the connection that it began with."""
    arena.expect_progress()
    yield
    arena.expect_progress()


@pytest.fixture
def eve(arena: Arena) -> Iterator[Attacker]:
    with Attacker(arena) as attacker:
        attacker.greet()
        yield attacker


# --- what a message holds -------------------------------------------------------------------


def test_an_oversized_header_is_refused(eve: Attacker) -> None:
    reason = eve.expect_fault("RemoteProtocolError", eve.forge({}, pad=MAX_HEADER))
    assert "header" in reason


def test_a_header_that_announces_more_than_there_is_is_refused(eve: Attacker) -> None:
    eve.expect_fault("RemoteProtocolError", struct.pack("<Q", 2**63) + b"{}")


@pytest.mark.parametrize(
    ("offsets", "size"),
    [
        (([0, 112], [0, 112]), 112),  # the same bytes twice
        (([0, 112], [56, 168]), 168),  # overlapping
        (([0, 112], [112, 2**60]), 224),  # beyond the end
        (([0, 112], [-112, 0]), 112),  # before the beginning
        (([0, 112], [120, 232]), 232),  # with a gap
    ],
)
def test_offsets_that_overlap_or_lie_elsewhere_are_refused(
    eve: Attacker, offsets: tuple[list[int], list[int]], size: int
) -> None:
    first, second = ({"dtype": "F32", "shape": [4, 7], "data_offsets": each} for each in offsets)
    eve.expect_fault(
        "RemoteProtocolError", eve.forge({FORWARD: first, "other": second}, bytes(size))
    )


@pytest.mark.parametrize("dtype", ["F128", "object", "", "F32\x00", "O"])
def test_an_unknown_dtype_is_refused(eve: Attacker, dtype: str) -> None:
    wire = {"dtype": dtype, "shape": [4, 7], "data_offsets": [0, 112]}
    eve.expect_fault("RemoteProtocolError", eve.forge({FORWARD: wire}, bytes(112)))


@pytest.mark.parametrize("shape", [(4, 8), (4,), (4, 7, 1), (7, 4)])
def test_a_wrong_shape_is_refused(eve: Attacker, shape: tuple[int, ...]) -> None:
    eve.expect_fault("ArrayMismatch", eve.make_task(), {FORWARD: np.ones(shape, np.float32)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(eve: Attacker, value: float) -> None:
    waves = WAVES.copy()
    waves[3, 6] = value
    eve.expect_fault("NotFinite", eve.make_task(), {FORWARD: waves})


# --- what a message refers to -----------------------------------------------------------------


class Recorder:
    """A transport that keeps what went through it."""

    def __init__(self, transport: WebSocketTransport) -> None:
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        self.bytes_sent = self.bytes_received = 0
        self._transport = transport

    def send(self, chunks: Sequence[Chunk]) -> None:
        self.sent.append(b"".join(chunks))
        self._transport.send(chunks)

    def receive(self) -> bytes:
        self.received.append(bytes(self._transport.receive()))
        return self.received[-1]

    def close(self) -> None:
        self._transport.close()


def test_a_replayed_step_gets_its_replies_again_and_another_in_its_place_is_refused(
    arena: Arena,
) -> None:
    record = Recorder(connect(arena.url, credentials=arena.credentials("eve")))
    with Client(arena.bundle.client, record, threads=1) as client:
        client.step({name: array[:8] for name, array in DATA.items()})
        _, first, second = record.sent
        _, *replies = record.received
        with Attacker(arena) as attacker:
            attacker.greet(client.session, generation=2, step=1)
            assert [attacker.ask_raw(first), attacker.ask_raw(second)] == replies
            task, tensors = decode_message(first)
            (name,) = tensors
            attacker.expect_fault("StepConflict", task, {name: 2 * tensors[name]})
        with Attacker(arena) as attacker:
            attacker.greet(client.session, generation=3, step=1)  # the step was made once


def test_a_client_whose_session_another_takes_over_does_not_take_it_back(arena: Arena) -> None:
    first = Client(arena.bundle.client, arena.url, credentials=arena.credentials("eve"), threads=1)
    with first, Attacker(arena) as second:
        batch = {name: array[:8] for name, array in DATA.items()}
        first.step(batch)
        second.greet(first.session, generation=2, step=1)
        with pytest.raises(StaleConnection):
            first.step(batch)
        assert first.steps == 1
        assert isinstance(second.ask(second.make_task(1), {FORWARD: WAVES})[0], Tensors)


@pytest.mark.parametrize("step", [-1, 1, 2**63 - 1])
def test_a_step_that_is_not_due_is_refused(eve: Attacker, step: int) -> None:
    eve.expect_fault("RemoteProtocolError", eve.make_task(step), {FORWARD: WAVES})


def test_a_stale_generation_is_refused(arena: Arena) -> None:
    with Attacker(arena) as older, Attacker(arena) as newer:
        older.greet()
        newer.greet(older.session, generation=2)
        with pytest.raises(ConnectionLost) as ended:  # by the newer one
            older.ask(older.make_task(), {FORWARD: WAVES})
        assert ended.value.code == REPLACED
        with Attacker(arena) as again:
            again.expect_fault("StaleConnection", again.make_hello(older.session, generation=2))
        assert isinstance(newer.ask(newer.make_task(), {FORWARD: WAVES})[0], Tensors)


def test_another_session_s_id_is_refused_with_the_same_token_and_with_another(
    arena: Arena, eve: Attacker
) -> None:
    with Attacker(arena) as same:
        same.greet()
        same.expect_fault(
            "RemoteProtocolError", same.make_task(session=eve.session), {FORWARD: WAVES}
        )
    with Attacker(arena, "ana") as other:
        other.expect_fault("ForeignSession", other.make_hello(eve.session, generation=9))
    assert isinstance(eve.ask(eve.make_task(), {FORWARD: WAVES})[0], Tensors)


@pytest.mark.parametrize(
    "name",
    ["../../../etc/passwd", "/etc/passwd", "..", "", "a" * 33, "A" * 32, "0" * 31 + "/",
     "0" * 32 + "\n", "\x00" * 32, "\u0660" * 32, "a" * 100_000],
)  # fmt: skip
def test_path_characters_in_ids_are_refused(arena: Arena, name: str) -> None:
    with Attacker(arena) as attacker:
        attacker.expect_fault("RemoteProtocolError", attacker.make_hello(name))
    with Attacker(arena) as attacker:
        attacker.greet()
        attacker.expect_fault("RemoteProtocolError", Save(session=name, step=0))


# --- who comes ----------------------------------------------------------------------------------


def expect_shut_out(arena: Arena, message: Message) -> None:
    """It is said without a token, is answered by one fault, and there is nothing more."""
    transport = connect(arena.url)
    transport.send(encode_message(message))
    fault, _ = decode_message(transport.receive())
    assert isinstance(fault, Fault)
    assert fault.code == "Unauthorized"
    with pytest.raises(Unauthorized):
        transport.receive()
    transport.close()


@pytest.mark.parametrize("token", ["x" * 43, "", "ana", "' OR 1=1"])
def test_a_wrong_token_is_refused_in_the_header_and_as_a_message(arena: Arena, token: str) -> None:
    with pytest.raises(Unauthorized) as caught:
        connect(arena.url, credentials=Credentials(token=token))
    assert caught.value.status == 401
    expect_shut_out(arena, Login(token=token))


def test_a_right_token_as_a_message_lets_in_as_browsers_come(arena: Arena) -> None:
    with Attacker(arena) as attacker:
        hello = attacker.make_hello()
    transport = connect(arena.url)
    transport.send(encode_message(Login(token=arena.tokens["ana"])))
    transport.send(encode_message(hello))  # without waiting
    welcome, _ = decode_message(transport.receive())
    assert isinstance(welcome, Welcome)
    transport.close()


def test_a_greeting_before_a_token_is_not_heard(arena: Arena) -> None:
    with Attacker(arena) as attacker:
        hello = attacker.make_hello()
    expect_shut_out(arena, hello)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1"])
def test_a_wrong_origin_is_refused_even_with_a_token(arena: Arena, origin: str) -> None:
    with dial(arena.port) as connection:
        head = shake(
            connection, f"Authorization: Bearer {arena.tokens['eve']}", f"Origin: {origin}"
        )
        assert b" 403 " in head


# --- and meanwhile ------------------------------------------------------------------------------


def test_the_honest_client_s_weights_are_those_of_an_undisturbed_run(arena: Arena) -> None:
    expect_undisturbed(arena)
