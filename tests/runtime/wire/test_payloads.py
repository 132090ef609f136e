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
    read_payloads(fast, lambda _: None)
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
    reader = read_payloads(protocol, lambda size: memory[:size])
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


def test_an_announced_payload_takes_no_memory_beyond_a_bound() -> None:
    asked: list[int] = []
    protocol = Protocol(Side.CLIENT, max_size=None)
    reader = read_payloads(protocol, asked.append)
    for size in (100, 1 << 40):
        protocol.receive_data(b"\x02\x7f" + size.to_bytes(8, "big"))
        protocol.receive_data(bytes(100))
    assert asked == []
    assert reader.gap is None


def test_a_frame_that_breaks_off_ends_the_connection() -> None:
    protocol = Protocol(Side.CLIENT)
    read_payloads(protocol, lambda _: None)
    protocol.receive_data(Frame(Opcode.BINARY, bytes(50_000)).serialize(mask=False)[:-1])
    protocol.receive_eof()
    assert isinstance(protocol.parser_exc, EOFError)
    assert protocol.state is State.CLOSED


def test_limits_of_the_library_hold_before_a_payload_is_read() -> None:
    protocol = Protocol(Side.CLIENT, max_size=60_000)
    read_payloads(protocol, lambda _: None)
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
