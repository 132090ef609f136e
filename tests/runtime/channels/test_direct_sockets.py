"""A client's socket that receives large payloads where they stay."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.uri import parse_uri

from splitonnx.runtime.channels.direct_sockets import RECEIVED, DirectSocket
from splitonnx.runtime.channels.websockets import connect
from splitonnx.runtime.wire.payloads import read_payloads
from tests.support.echoes import PATIENCE, Echo

SIZE = 1 << 16
MEMORY = memoryview(bytearray(SIZE))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(PATIENCE)
        yield here, there


def test_a_large_payload_comes_to_its_memory_and_the_library_hears_of_its_frame(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    here, there = ends
    protocol = ClientProtocol(parse_uri("ws://127.0.0.1/"), state=OPEN)
    direct = DirectSocket(here, read_payloads(protocol, lambda *_: MEMORY))
    content = np.random.default_rng(0).bytes(SIZE)
    sent = Frame(Opcode.BINARY, content).serialize(mask=False)
    there.sendall(sent[:100])
    protocol.receive_data(direct.recv(1 << 18))  # the header, and what came with it
    there.sendall(sent[100:] + Frame(Opcode.PING, b"?").serialize(mask=False))
    count = 0
    while protocol.reader.gap:  # type: ignore[attr-defined]
        received = direct.recv(10)  # however few are asked for
        assert received is RECEIVED
        protocol.receive_data(received)
        count += 1
    assert count < 100
    (frame,) = protocol.events_received()
    assert isinstance(frame, Frame)
    assert frame.data is MEMORY
    assert content == MEMORY
    protocol.receive_data(direct.recv(1 << 18))
    (ping,) = protocol.events_received()
    assert ping == Frame(Opcode.PING, b"?")


def test_the_end_within_a_payload_is_the_end_and_what_was_received_is_not(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    here, there = ends
    protocol = ClientProtocol(parse_uri("ws://127.0.0.1/"), state=OPEN)
    direct = DirectSocket(here, read_payloads(protocol, lambda *_: None))
    there.sendall(Frame(Opcode.BINARY, bytes(SIZE)).serialize(mask=False)[:200])
    there.close()
    protocol.receive_data(direct.recv(100))
    assert direct.recv(100) != b""
    assert direct.recv(100) == b""


@pytest.mark.alone
def test_a_time_limit_is_for_each_part_that_the_other_side_takes(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    here, there = ends
    protocol = ClientProtocol(parse_uri("ws://127.0.0.1/"), state=OPEN)
    direct = DirectSocket(here, read_payloads(protocol, lambda *_: None))
    content = np.random.default_rng(0).bytes(4 << 20)
    received = bytearray()

    def read() -> None:
        while len(received) < len(content):
            threading.Event().wait(0.02)
            received.extend(there.recv(1 << 16))

    reading = threading.Thread(target=read)
    reading.start()
    direct.settimeout(0.5)  # less than half of what all of it takes
    direct.sendall(content)
    reading.join(PATIENCE)
    assert received == content
    with pytest.raises(TimeoutError):
        direct.sendall(content)  # nobody reads any more


def test_a_connection_reads_large_messages_so() -> None:
    with Echo() as echo:
        transport = connect(echo.url)
        assert isinstance(transport._socket.socket, DirectSocket)
        content = np.random.default_rng(1).bytes(5 << 20)
        for _ in range(3):
            transport.send([content])
            assert transport.receive() == content
        transport.close()
