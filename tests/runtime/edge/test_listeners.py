"""Listening sockets that count who has come in."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from splitonnx.errors import PortInUse, UsageError
from splitonnx.runtime.edge import listeners
from splitonnx.runtime.edge.listeners import (
    GRACE_SECONDS,
    RETRY_SECONDS,
    SWEEP,
    AcceptedSocket,
    HandshakeQuota,
    ignore_scarcity,
    open_listeners,
)
from tests.support.echoes import dial, read_to_end


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", ""])
def test_a_host_of_several_addresses_has_one_port(host: str) -> None:
    opened = open_listeners(host, 0, HandshakeQuota(1, lambda: None))
    try:
        (port,) = {listener.getsockname()[1] for listener in opened}
        with dial(port), pytest.raises(PortInUse):
            open_listeners(host, port, HandshakeQuota(1, lambda: None))
    finally:
        for listener in opened:
            listener.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
def test_an_address_of_another_machine_cannot_be_listened_on(host: str) -> None:
    with pytest.raises(UsageError, match="cannot listen"):
        open_listeners(host, 0, HandshakeQuota(1, lambda: None))


# --- who is counted, and for how long ---------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """A quota, and sockets that come to it."""

    def __init__(self, capacity: int, clock: Clock) -> None:
        self.full = self.scarce = 0
        self.quota = HandshakeQuota(capacity, self._count_full, self._count_scarce)
        self._clock = clock
        self._others: list[socket.socket] = []
        self.clients: list[AcceptedSocket] = []

    def _count_full(self) -> None:
        self.full += 1

    def _count_scarce(self) -> None:
        self.scarce += 1

    def come(self) -> bool:
        """Let one more socket come, and say whether it was let in."""
        here, there = socket.socketpair()
        client = AcceptedSocket(fileno=here.detach())
        client.came = self._clock()
        self.clients.append(client)
        self._others.append(there)
        is_in = self.quota.admit(client)
        client.quota = self.quota if is_in else None
        return is_in

    def is_open(self, place: int) -> bool:
        """Whether the other end of a socket's connection still waits for something."""
        self._others[place].setblocking(False)
        try:
            return self._others[place].recv(1) != b""
        except BlockingIOError:
            return True

    def close(self) -> None:
        for end in (*self.clients, *self._others):
            end.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(listeners, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def gate(clock: Clock) -> Iterator[Gate]:
    gate = Gate(2, clock)
    yield gate
    gate.close()


def test_with_one_too_many_the_newest_goes_as_long_as_the_oldest_is_new(
    gate: Gate, clock: Clock
) -> None:
    assert [gate.come(), gate.come(), gate.come()] == [True, True, False]
    assert gate.full == 1
    clock.now += GRACE_SECONDS * 0.9
    assert not gate.come()
    assert gate.is_open(0)
    assert gate.is_open(1)


def test_with_one_too_many_the_oldest_goes_once_it_had_its_time(gate: Gate, clock: Clock) -> None:
    gate.come()
    clock.now += GRACE_SECONDS
    gate.come()
    assert gate.come()
    assert [gate.is_open(place) for place in range(3)] == [False, True, True]
    assert not gate.come()  # the second has not had its time


@pytest.mark.parametrize(
    "leave",
    [
        lambda gate: gate.quota.release(gate.clients[0].fileno()),
        lambda gate: gate.clients[0].close(),
        lambda gate: os.close(gate.clients[0].detach()),
    ],
    ids=["its handshake is done", "it is closed", "the event loop closes it, as uvloop's does"],
)
def test_a_place_is_free_again_when_one_leaves(gate: Gate, leave: Callable[[Gate], None]) -> None:
    gate.come()
    gate.come()
    leave(gate)
    assert gate.come()
    assert gate.full == 0
    assert not gate.come()


def test_who_comes_when_files_run_out_is_not_let_in(gate: Gate) -> None:
    gate.quota._ceiling = 0
    assert not gate.come()
    assert (gate.scarce, gate.full) == (1, 0)


def test_memory_is_searched_for_now_and_then_and_not_at_each_connection(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[int] = []
    monkeypatch.setattr(listeners, "gc", SimpleNamespace(collect=lambda: searches.append(1)))
    for _ in range(3 * SWEEP):
        gate.quota.sweep()
    assert len(searches) == 3


def test_a_listener_closes_whom_the_quota_has_no_place_for(clock: Clock) -> None:
    quota = HandshakeQuota(1, lambda: None)
    (listener,) = open_listeners("127.0.0.1", 0, quota)
    port = listener.getsockname()[1]
    with listener, dial(port) as first, dial(port) as second:
        accepted, address = listener.accept()
        assert address == first.getsockname()
        with accepted, pytest.raises(BlockingIOError):
            listener.accept()
        assert read_to_end(second) == b""


def test_without_a_descriptor_a_listener_is_silent_for_a_while(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop would try again at once, and log each time."""
    told: list[int] = []
    quota = HandshakeQuota(1, lambda: None, lambda: told.append(1))
    tried: list[int] = []

    def fail(_: socket.socket) -> None:
        tried.append(1)
        raise OSError(errno.EMFILE, "Too many open files")

    (listener,) = open_listeners("127.0.0.1", 0, quota)
    monkeypatch.setattr(socket.socket, "accept", fail)
    with listener:
        with pytest.raises(OSError, match="Too many open files"):
            listener.accept()
        for _ in range(3):
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert (len(tried), len(told)) == (1, 1)
        clock.now += RETRY_SECONDS
        with pytest.raises(OSError, match="Too many open files"):
            listener.accept()


@pytest.mark.parametrize(
    ("error", "is_logged"),
    [(OSError(errno.EMFILE, "none left"), False), (OSError(errno.EPERM, "no"), True), (None, True)],
)
def test_the_event_loop_s_own_word_on_a_want_of_descriptors_is_dropped(
    error: OSError | None, is_logged: bool
) -> None:
    told: list[dict[str, Any]] = []
    loop = SimpleNamespace(default_exception_handler=told.append)
    ignore_scarcity(loop, {"exception": error})  # type: ignore[arg-type]
    assert bool(told) is is_logged
