"""A server's sessions in memory: who may have which, how many, and what makes room."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import BundleMismatch, ServerBusy
from splitonnx.messages import Bye, Welcome
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.server.sessions import Session
from splitonnx.runtime.storage.checkpoints import Checkpoint, CheckpointStore
from tests.support import tiny
from tests.support.callers import Caller, expect_fault
from tests.support.registries import ANN, BOB, advance, greet, open_registry
from tests.support.zoo import ZOO


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


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


WAIT = 60.0
"""Seconds that nothing here takes, unless it hangs."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.split_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle" / "server"


class SlowDisk:
    """Stops every write of a session that is unloaded until it may continue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes, self.continues = threading.Event(), threading.Event()
        write = CheckpointStore.write_stopped

        def wait(store: CheckpointStore, checkpoint: Checkpoint) -> None:
            self.writes.set()
            assert self.continues.wait(WAIT)
            write(store, checkpoint)

        monkeypatch.setattr(CheckpointStore, "write_stopped", wait)


def test_while_a_session_is_unloaded_to_a_slow_disk_others_are_greeted_and_only_it_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    registry = open_registry(folder, sessions=2)
    unloaded = registry.find(greet(ANN), "ann")
    advance(registry, unloaded, 6)
    registry.release(unloaded)
    attended = registry.find(greet(BOB), "bob")
    tried: set[str] = set()
    room = registry.seek(greet("c" * 32), "cleo", tried)  # makes room, and waits for nothing
    assert not isinstance(room, Session)
    assert disk.writes.wait(WAIT)
    assert registry.find(greet(BOB, generation=2), "bob") is attended
    registry.release(attended)
    again = registry.seek(greet(ANN, generation=2), "ann", set())
    assert not isinstance(again, Session)
    assert not again.done()
    assert not again.cancel()
    disk.continues.set()
    again.result(WAIT)
    room.result(WAIT)
    assert isinstance(registry.seek(greet("c" * 32), "cleo", tried), Session)
    with pytest.raises(ServerBusy):
        registry.find(greet("d" * 32), "dan")
    registry.release(attended)
    returned = registry.find(greet(ANN, generation=2), "ann")
    assert returned is not unloaded
    assert returned.ledger.step == 6


def test_a_server_greets_others_while_a_disk_is_slow(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    place = folder.parent / "client"
    party = PartyBundle.load(place)
    memory = PartyBundle(manifest=party.manifest, graphs=party.graphs, weights=party.weights)
    with Server(folder, port=0, threads=1, limits=Limits(sessions=2)) as server:
        first = Client(memory, server.url, threads=1)
        first.step(tiny.batch(0))
        first._runner._channel.close(for_good=False)  # type: ignore[union-attr]  # it hangs up
        with Client(memory, server.url, threads=1) as second:
            late: list[Client] = []
            thread = threading.Thread(
                target=lambda: late.append(
                    Client(memory, server.url, threads=1, give_up_after=WAIT)
                )
            )
            thread.start()
            assert disk.writes.wait(WAIT)
            for number in range(3):
                second.step(tiny.batch(number))
            assert not late
            disk.continues.set()
            thread.join(WAIT)
            assert len(late) == 1
            late[0].step(tiny.batch(0))
            late[0].close()


def test_a_greeting_that_fails_leaves_the_name_free(folder: Path) -> None:
    registry = open_registry(folder)
    for _ in range(2):
        with pytest.raises(BundleMismatch):
            registry.find(greet(ANN, origin=BOB, start=3), "ann")
    assert registry.find(greet(ANN), "ann").id == ANN


def test_when_the_last_connection_of_a_session_left_is_known_until_it_is_back(
    folder: Path,
) -> None:
    now = 3.0
    registry = open_registry(folder, clock=lambda: now)
    ann, bob = registry.find(greet(ANN), "ann"), registry.find(greet(BOB), "bob")
    registry.release(ann)
    now = 8.0
    registry.release(bob)
    assert registry.list_left() == {ANN: 3.0, BOB: 8.0}
    registry.find(greet(ANN, generation=2), "ann")
    assert registry.list_left() == {BOB: 8.0}
    registry.end(bob)
    assert registry.list_left() == {}
