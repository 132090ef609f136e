"""Payloads that are received where they stay, and fragments that are sent without copies.

The judge is the websockets library's own parser and its own serialization.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.protocol import Event, Protocol, Side, State

from splitonnx.runtime.wire.payloads import measure_waiting, read_payloads, write_fragment

SIZES = (0, 5, 125, 126, 1 << 14, (1 << 16) - 1, 1 << 16, 1 << 20, (1 << 22) + 1)


def make_payloads() -> list[bytes]:
    random = np.random.default_rng(0)
    return [random.bytes(size) for size in SIZES]


def describe(events: list[Event]) -> list[tuple[Opcode, bytes, bool]]:
    frames = [event for event in events if isinstance(event, Frame)]
    assert len(frames) == len(events)
    return [(frame.opcode, bytes(frame.data), frame.fin) for frame in frames]


def write(sender: Protocol, payloads: list[bytes]) -> bytes:
    last = len(payloads) - 1
    for number, payload in enumerate(payloads):
        write_fragment(sender, memoryview(payload), is_first=number == 0, is_last=number == last)
        if number < last:
            sender.send_ping(b"there?")
    return b"".join(sender.data_to_send())


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("step", [1 << 12, (1 << 18) + 3, 1 << 30])
def test_frames_are_read_as_the_library_reads_them(side: Side, step: int) -> None:
    """Whatever is masked, and however the bytes arrive."""
    content = write(Protocol(Side(1 - side)), make_payloads())
    plain, fast = Protocol(side, max_size=None), Protocol(side, max_size=None)
    read_payloads(fast, lambda *_: None)
    for start in range(0, len(content), step):
        for protocol in (plain, fast):
            protocol.receive_data(content[start : start + step])
    expected = describe(plain.events_received())
    assert describe(fast.events_received()) == expected
    sent = [data for opcode, data, _ in expected if opcode is not Opcode.PING]
    assert sent == make_payloads()
    assert fast.data_to_send()  # the pongs
    assert fast.parser_exc is None


def test_a_payload_fills_the_memory_that_it_was_given() -> None:
    memory = memoryview(bytearray(1 << 16))
    protocol = Protocol(Side.CLIENT)
    reader = read_payloads(protocol, lambda size, _: memory[:size])
    content = np.random.default_rng(1).bytes(50_000)
    sent = Frame(Opcode.BINARY, content).serialize(mask=False)
    protocol.receive_data(sent[:100])
    assert reader.is_underway
    gap = reader.gap
    assert gap is not None
    gap[:1000] = sent[100:1100]  # straight from a socket
    reader.fill(1000)
    protocol.receive_data(sent[1100:] + b"\x82")
    (frame,) = protocol.events_received()
    assert isinstance(frame, Frame)
    assert memory[:50_000] == content == frame.data
    assert not reader.gap
    assert reader.is_underway  # the next frame has begun


def test_a_masked_payload_fills_the_memory_that_it_was_given_without_its_mask() -> None:
    memory = memoryview(bytearray(1 << 17))
    asked: list[tuple[int, int]] = []

    def place(size: int, waiting: int) -> memoryview:
        asked.append((size, waiting))
        return memory[waiting : waiting + size]

    protocol = Protocol(Side.SERVER)
    reader = read_payloads(protocol, place)
    content = np.random.default_rng(1).bytes(1 << 17)
    parts = content[: 1 << 16], content[1 << 16 :]
    first = Frame(Opcode.BINARY, parts[0], fin=False).serialize(mask=True)
    second = Frame(Opcode.CONT, parts[1]).serialize(mask=True)
    protocol.receive_data(first + second[:100])
    gap = reader.gap
    assert gap is not None
    gap[:] = second[100:]
    reader.fill(len(gap))
    protocol.receive_data(b"")
    frames = protocol.events_received()
    assert asked == [(1 << 16, 0), (1 << 16, 1 << 16)]
    assert memory == content
    assert all(isinstance(frame, Frame) and frame.data.obj is memory.obj for frame in frames)  # type: ignore[union-attr]


LARGE = 100_000


def mask(
    opcode: int, size: int = LARGE, *, flags: int = 0x80, announced: int | None = None
) -> bytes:
    """Write a masked frame whose size takes eight bytes."""
    length = (size if announced is None else announced).to_bytes(8, "big")
    return bytes([flags | opcode, 0xFF]) + length + b"\1\2\3\4" + bytes(size)


@pytest.mark.parametrize("is_trickling", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        mask(Opcode.BINARY) + mask(Opcode.BINARY, 20),
        mask(Opcode.TEXT) + mask(Opcode.BINARY),
        mask(Opcode.BINARY, flags=0) + mask(Opcode.CONT),
        mask(Opcode.BINARY, flags=0) + mask(Opcode.CONT, LARGE + 1),
        mask(Opcode.BINARY, 2 * LARGE + 1),
        mask(Opcode.BINARY, 10, announced=1 << 62),
        mask(Opcode.BINARY, flags=0) + mask(Opcode.BINARY),
        mask(Opcode.CONT),
        mask(Opcode.BINARY, flags=0xC0),
        mask(Opcode.BINARY, flags=0xA0),
        mask(Opcode.PING),
        mask(3),
        mask(Opcode.BINARY, 0),
        mask(Opcode.CLOSE, 0) + mask(Opcode.BINARY),
        mask(Opcode.BINARY)[:-1],
        mask(Opcode.BINARY)[:13],
        mask(Opcode.BINARY)[:1],
        b"\x82\x7f" + bytes(20),
    ],
    ids=["binary", "text", "fragments", "too large together", "too large", "far too large",
         "no continuation", "nothing to continue", "compressed", "reserved", "ping", "unknown",
         "empty", "after the close", "cut off", "a cut header", "one byte", "without a mask"],
)  # fmt: skip
def test_whatever_a_client_sends_is_taken_as_the_library_takes_it(
    content: bytes, is_trickling: bool
) -> None:
    """Also what is wrong, with the same code and the same words."""
    found = []
    for is_fast in (False, True):
        server = Protocol(Side.SERVER, max_size=2 * LARGE)
        if is_fast:
            read_payloads(server, lambda *_: None)
        pieces = [content[n : n + 1] for n in range(20)] + [content[20:]]
        for piece in pieces if is_trickling else [content]:
            if piece:
                server.receive_data(piece)
        server.receive_eof()
        fault = server.parser_exc
        words = str(fault).partition(" ends ")[0]  # each counts what is missing in its own way
        events = describe(server.events_received())
        found.append((events, type(fault), words, server.data_to_send(), server.state))
    assert found[1] == found[0]


def test_an_announced_payload_takes_no_memory_beyond_a_bound() -> None:
    asked: list[int] = []
    protocol = Protocol(Side.CLIENT, max_size=None)
    reader = read_payloads(protocol, lambda size, _: asked.append(size))
    for size in (100, 1 << 40):
        protocol.receive_data(b"\x02\x7f" + size.to_bytes(8, "big"))
        protocol.receive_data(bytes(100))
    assert asked == []
    assert reader.gap is None


def test_a_frame_that_breaks_off_ends_the_connection() -> None:
    protocol = Protocol(Side.CLIENT)
    read_payloads(protocol, lambda *_: None)
    protocol.receive_data(Frame(Opcode.BINARY, bytes(50_000)).serialize(mask=False)[:-1])
    protocol.receive_eof()
    assert isinstance(protocol.parser_exc, EOFError)
    assert protocol.state is State.CLOSED


def test_limits_of_the_library_hold_before_a_payload_is_read() -> None:
    protocol = Protocol(Side.CLIENT, max_size=60_000)
    read_payloads(protocol, lambda *_: None)
    first = Frame(Opcode.BINARY, bytes(40_000), fin=False).serialize(mask=False)
    second = Frame(Opcode.CONT, bytes(20_001)).serialize(mask=False)
    protocol.receive_data(first + second[:4])
    assert "20001 bytes after reading 40000 bytes exceeds limit of 60000" in str(
        protocol.parser_exc
    )


def test_each_masked_frame_has_a_key_of_its_own() -> None:
    client = Protocol(Side.CLIENT)
    for number in range(8):
        write_fragment(client, memoryview(bytes(8)), is_first=number == 0, is_last=False)
    payloads = client.data_to_send()[1::2]  # zeros, masked: the key
    assert len(set(payloads)) == 8


def test_a_servers_payload_is_sent_from_where_it_is() -> None:
    server, content = Protocol(Side.SERVER), bytearray(1 << 16)
    write_fragment(server, memoryview(content), is_first=True, is_last=True)
    _, payload = server.data_to_send()
    assert isinstance(payload, memoryview)
    assert payload.obj is content


def test_nothing_is_written_to_a_connection_that_is_not_open() -> None:
    client = Protocol(Side.CLIENT)
    client.send_close()
    with pytest.raises(InvalidState, match="closing"):
        write_fragment(client, memoryview(b"x"), is_first=True, is_last=True)


def test_what_waits_counts_until_its_message_ends() -> None:
    protocol = Protocol(Side.CLIENT)
    kinds = [(Opcode.BINARY, False), (Opcode.PING, True), (Opcode.CONT, False)]
    counts = []
    for opcode, fin in itertools.chain(kinds, [(Opcode.CONT, True)]):
        protocol.receive_data(Frame(opcode, b"four", fin=fin).serialize(mask=False))
        counts.append(measure_waiting(protocol))
    assert counts == [4, 4, 8, None]
