"""Attacks by time and mass on a real server, while an honest client trains in it.

Each is refused within its limit; the server's memory stays bounded, and the honest client's
weights end equal, bit for bit, to those of a run that nobody disturbed.
"""

from __future__ import annotations

import socket
import sys
import uuid
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import numpy as np
import pytest

from splitonnx.messages import Hello, Tensors, encode_message
from splitonnx.micro_batches import MICRO_BATCH_WEIGHT as WEIGHT
from splitonnx.micro_batches import MOST_IN_FLIGHT
from splitonnx.runtime.wire.protocols import list_wires
from tests.support.arenas import FORWARD, MIB, Arena, Attacker, expect_undisturbed, many_files
from tests.support.echoes import (
    BINARY,
    CONT,
    FIN,
    PING,
    dial,
    frame,
    read_close,
    read_to_end,
    shake,
    trickle,
    upgrade,
)
from tests.support.event_loops import LOOPS

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]

CROWD = 1000
"""Connections without a token."""
SHOWN_OUT = ("TooManyStrangers", "HandshakeTooSlow", "NoToken")
"""Why they go."""
CROWD_MIB = 16
"""Bound on what they add to the server's memory."""
BOMB_MIB = 8
"""Bound on what a bomb adds."""
SECONDS = 1.0
"""The limits of time in these tests."""


@pytest.fixture(scope="module", params=LOOPS)
def arena(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Arena]:
    running = Arena(
        tmp_path_factory.mktemp("arena"),
        "--max-handshake-seconds", SECONDS, "--max-login-seconds", SECONDS,
        "--max-message-seconds", SECONDS, "--max-message-bytes", 4 * MIB, loop=request.param,
    )  # fmt: skip
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _unharmed(arena: Arena) -> Iterator[None]:
    """The honest client trains on after each attack, over the connection that it began with."""
    arena.expect_progress()
    yield
    arena.expect_progress()


# --- how slowly a message comes ---------------------------------------------------------------


def test_a_slow_loris_in_the_handshake_is_cut_off(arena: Arena) -> None:
    with dial(arena.port) as connection:
        trickle(connection, upgrade(*(f"X-{n}: {n}" for n in range(50))))
        read_to_end(connection)
        arena.expect_refusal("HandshakeTooSlow", 1)


def test_a_slow_loris_within_a_frame_is_cut_off(arena: Arena) -> None:
    with dial(arena.port) as connection:
        shake(connection, f"Authorization: Bearer {arena.tokens['eve']}")
        trickle(connection, frame(bytes(MIB)))
        read_to_end(connection)
        arena.expect_refusal("MessageTooSlow", 1)


def test_a_slow_loris_by_fragments_is_cut_off_in_spite_of_its_pings(arena: Arena) -> None:
    with dial(arena.port) as connection:
        shake(connection, f"Authorization: Bearer {arena.tokens['eve']}")
        connection.sendall(frame(b"x", BINARY, flags=0))
        trickle(connection, (frame(b"x", CONT, flags=0) + frame(b"", PING)) * 1000, step=13)
        read_to_end(connection)
        arena.expect_refusal("MessageTooSlow", 2)


def test_who_keeps_the_token_back_is_shown_out(arena: Arena) -> None:
    with dial(arena.port) as connection:
        shake(connection)
        read_to_end(connection)
        arena.expect_refusal("NoToken", 1)


# --- how much comes ---------------------------------------------------------------------------


def test_a_deflate_bomb_is_not_inflated(arena: Arena) -> None:
    bomb = zlib.compressobj(wbits=-15)
    piece = bomb.compress(bytes(8 * MIB)) + bomb.flush(zlib.Z_FULL_FLUSH)  # refers to no other
    assert len(zlib.decompressobj(wbits=-15).decompress(2 * piece)) == 16 * MIB
    packed = 64 * piece
    assert len(packed) < MIB
    arena.forget_peak()
    before = arena.resident_mib
    with dial(arena.port) as connection:
        extension = "Sec-WebSocket-Extensions: permessage-deflate"
        head = shake(connection, f"Authorization: Bearer {arena.tokens['eve']}", extension)
        assert b"permessage-deflate" not in head
        connection.sendall(frame(packed, flags=FIN | 0x40))
        assert read_close(connection) == 1002
    arena.expect_refusal("BrokenFrame", 1)
    grown = arena.peak_mib - before
    print(f"deflate bomb of 512 MiB: server's memory {before:.0f} MiB, at most {grown:+.1f} MiB")
    assert grown < BOMB_MIB


def test_a_message_larger_than_allowed_is_not_read(arena: Arena) -> None:
    arena.forget_peak()
    before = arena.resident_mib
    with dial(arena.port) as connection:
        shake(connection, f"Authorization: Bearer {arena.tokens['eve']}")
        connection.sendall(frame(b"", length=2**62))
        assert read_close(connection) == 1009
    assert arena.peak_mib - before < BOMB_MIB


def test_a_thousand_connections_without_a_token_are_bounded(arena: Arena) -> None:
    """They knock, begin a request or shake hands, and then wait; one client more gets in."""
    arena.forget_peak()
    before, shown_out = arena.resident_mib, arena.count_refusals(*SHOWN_OUT)
    crowded = arena.count_refusals("TooManyStrangers")
    with many_files(2 * CROWD), ExitStack() as crowd:
        waiting = [crowd.enter_context(dial(arena.port)) for _ in range(CROWD)]
        for number, client in enumerate(waiting):
            with suppress(BrokenPipeError, ConnectionResetError):  # it was shown out already
                client.sendall([b"", b"GET / HTTP/1.1\r\nX: ", upgrade()][number % 3])
        with Attacker(arena, "ana") as honest:
            honest.greet()
        for client in waiting:
            read_to_end(client)  # every one is shown out, by the crowd or by the clock
    grown = arena.peak_mib - before
    crowded = arena.count_refusals("TooManyStrangers") - crowded
    print(
        f"{CROWD} connections without a token: server's memory {before:.0f} MiB, at most "
        f"{grown:+.1f} MiB; {crowded} made room for others"
    )
    assert arena.count_refusals(*SHOWN_OUT) - shown_out == CROWD
    assert crowded > CROWD / 4  # the others had waited for too long before that
    assert len(arena.log) < 100_000
    assert grown < CROWD_MIB


def test_a_flood_of_pings_leaves_the_others_their_share(arena: Arena) -> None:
    with dial(arena.port) as connection:
        shake(connection, f"Authorization: Bearer {arena.tokens['eve']}")
        connection.sendall(frame(b"", PING) * 2000)
        arena.expect_progress()


def test_a_client_that_reads_no_reply_is_not_worked_for_however_much_it_may_have_open(
    arena: Arena,
) -> None:
    """It sends one micro-batch after the other, all of them as they should be."""
    rows, number = 4096, 2000
    manifest = arena.bundle.client.manifest
    session = uuid.uuid4().hex
    hello = Hello(
        digest=manifest.digest, session=session, step=0, in_flight=2**62, wires=list_wires(manifest)
    )
    forward = {FORWARD: np.zeros((rows, 7), np.float32), WEIGHT: np.array(0, np.float32)}
    backward = {"act3@client_grad": np.zeros((rows, 6), np.float32)}
    arena.forget_peak()
    before = arena.resident_mib
    sent = 0
    with dial(arena.port) as connection:
        shake(connection, f"Authorization: Bearer {arena.tokens['eve']}")
        connection.sendall(frame(b"".join(encode_message(hello))))
        connection.settimeout(2.0)
        with suppress(TimeoutError):
            for micro_batch in range(number):
                for turn, wires in enumerate((forward, backward)):
                    message = Tensors(
                        session=session,
                        phase="accumulate",
                        step=0,
                        micro_batch=micro_batch,
                        turn=turn,
                        seed=0,
                        learning_rate=0.0,
                    )
                    connection.sendall(frame(b"".join(encode_message(message, wires))))
                    sent += 1
        grown = arena.peak_mib - before
        arena.expect_progress()
    print(f"{sent} messages of 100 KiB unread: server's memory {before:.0f} MiB, {grown:+.1f} MiB")
    assert 2 * MOST_IN_FLIGHT < sent < 2 * number
    assert grown < 64


def test_random_bytes_break_nothing(arena: Arena) -> None:
    """As a request, in a request's headers, as frames, and as messages of who has a token."""
    random = np.random.default_rng(0)
    token = f"Authorization: Bearer {arena.tokens['eve']}"
    for number in range(200):
        noise = random.bytes(int(random.integers(1, 2000)))
        with dial(arena.port) as connection, suppress(BrokenPipeError, ConnectionResetError):
            match number % 4:
                case 0:
                    connection.sendall(noise + b"\r\n\r\n")
                case 1:
                    line = noise.replace(b"\r", b"").replace(b"\n", b"")
                    connection.sendall(
                        b"GET /metrics HTTP/1.1\r\nAuthorization: Bearer " + line + b"\r\n\r\n"
                    )
                case 2:
                    shake(connection, token)
                    connection.sendall(noise)
                case _:
                    shake(connection, token)
                    connection.sendall(frame(noise, opcode=int(random.integers(0, 3))))
            connection.shutdown(socket.SHUT_WR)
            assert b" 500 " not in read_to_end(connection)


# --- and meanwhile ------------------------------------------------------------------------------


def test_the_honest_client_s_weights_are_those_of_an_undisturbed_run(arena: Arena) -> None:
    expect_undisturbed(arena)
