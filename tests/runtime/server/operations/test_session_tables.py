"""What is known of sessions: who is connected, what they do, how far they are, how many fit."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from splitonnx.names import CLIENT
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.server.operations.session_tables import list_sessions
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.server.sessions import Session
from splitonnx.runtime.wire.protocols import Protocol, State
from splitonnx.runtime.wire.session_lists import MOST_OWNER, SessionEntry
from tests.support.callers import ACTIVATION, GRADIENT, SESSION, Caller, make_task
from tests.support.registries import ANN, BOB, advance, greet, open_registry
from tests.support.sharing import share_task, sharing_bundle
from tests.support.zoo import ZOO

CLEO = "c" * 32


class Clock:
    """A clock that stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Registry:
    sharing_bundle().save(tmp_path / "bundle")
    return open_registry(tmp_path / "bundle" / "server", clock=clock)


@pytest.fixture
def joint(tmp_path: Path) -> Registry:
    sharing_bundle().save(tmp_path / "joint")
    options = PolicyOptions(name="splitfed-v1", clients_min=2)
    return open_registry(tmp_path / "joint" / "server", joins=options)


def enter(registry: Registry, name: str) -> Session:
    return registry.find(greet(name), f"owner of {name[0]}")


def read(registry: Registry, now: float = 100.0) -> dict[str, SessionEntry]:
    return {one.session: one for one in list_sessions(registry, now).sessions}


def test_an_empty_server_lists_nobody(registry: Registry) -> None:
    found = list_sessions(registry, 0.0)
    assert (found.policy, found.rounds, found.sessions, found.left_out) == (
        "per-client", None, (), 0
    )  # fmt: skip


def test_of_a_session_is_listed_whose_it_is_and_how_far(registry: Registry) -> None:
    ann, bob = enter(registry, ANN), enter(registry, BOB)
    advance(registry, ann, 9)
    advance(registry, bob, 4)
    bob.note_received(70, 90.0)
    bob.note_sent(3)
    bob.note_received(7, 98.5)
    found = read(registry)
    assert list(found) == [ANN, BOB]
    assert found[BOB] == SessionEntry(
        session=BOB,
        owner="owner of b",
        step=4,
        version=4,
        round=None,
        activity="idle",
        steps_behind=5,
        rounds_behind=None,
        seconds_since_left=None,
        seconds_since_message=1.5,
        bytes_up=77,
        bytes_down=3,
        is_saved=False,
    )
    assert (found[ANN].steps_behind, found[ANN].seconds_since_message) == (0, None)


def test_a_session_without_a_connection_says_since_when(registry: Registry, clock: Clock) -> None:
    ann = enter(registry, ANN)
    registry.find(greet(ANN, generation=2), "owner of a")
    registry.release(ann)
    assert read(registry)[ANN].seconds_since_left is None  # another connection is there
    registry.release(ann)
    clock.now = 130.25
    assert read(registry, clock.now)[ANN].seconds_since_left == 30.25
    assert read(registry, 99.0)[ANN].seconds_since_left == 0.0  # asked as it left


def test_what_is_not_saved_is_told(registry: Registry) -> None:
    ann = enter(registry, ANN)
    assert read(registry)[ANN].is_saved
    advance(registry, ann, 1)
    assert not read(registry)[ANN].is_saved


def test_an_open_step_is_training_and_another_open_task_predicting() -> None:
    bundle = cut(ZOO["chain"].build(), at="act1", tail_at="act3")
    caller = Caller(bundle)
    registry = caller.dispatcher.registry

    def see() -> tuple[str, int]:
        found = read(registry)[SESSION]
        return found.activity, found.step

    assert see() == ("idle", 0)
    caller.say(make_task(), ACTIVATION)
    assert see() == ("training", 0)
    caller.say(make_task(turn=1), GRADIENT)
    assert see() == ("idle", 1)
    query = msgspec.structs.replace(make_task(step=1), phase="predict")
    protocol = Protocol(bundle.client.manifest, CLIENT)
    protocol.state = State.OPEN
    replies = caller.dispatcher.handle(b"".join(protocol.send(query, ACTIVATION)))
    next(replies)
    assert see() == ("predicting", 1)
    assert list(replies) == []
    assert see() == ("idle", 1)


def test_who_shared_waits_until_the_round_is_closed_and_who_did_not_is_behind(
    joint: Registry,
) -> None:
    for name in (ANN, BOB, CLEO):
        joint.find(greet(name), name[0])
    list(joint.policy.submit(share_task(ANN, 0, 1.0)))
    first = list_sessions(joint, 0.0)
    assert (first.policy, first.rounds) == ("splitfed-v1", 0)
    assert [(one.activity, one.round, one.rounds_behind) for one in first.sessions] == [
        ("waiting", None, 0), ("idle", None, 0), ("idle", None, 0)
    ]  # fmt: skip
    list(joint.policy.submit(share_task(BOB, 0, 1.0)))
    for step in (1, 2):
        for name in (ANN, BOB):
            list(joint.policy.submit(share_task(name, step, 1.0, samples=1)))
    last = list_sessions(joint, 0.0)
    assert last.rounds == 2
    assert [(one.activity, one.round, one.rounds_behind) for one in last.sessions] == [
        ("idle", 2, 0), ("idle", 2, 0), ("idle", None, 3)
    ]  # fmt: skip


def test_without_a_token_only_the_beginning_of_an_id_is_listed(registry: Registry) -> None:
    enter(registry, ANN)
    (one,) = list_sessions(registry, 0.0, whole_ids=False).sessions
    assert one.session == "aaaaaaaa"


def test_a_long_list_is_cut_to_those_that_are_connected_or_left_last(
    registry: Registry, clock: Clock
) -> None:
    names = [digit * 32 for digit in "0123456"]
    sessions = [enter(registry, name) for name in names]
    for place, clock.now in ((1, 40.0), (3, 60.0), (5, 50.0)):
        registry.release(sessions[place])
    found = list_sessions(registry, 100.0, most=5)
    assert [one.session[0] for one in found.sessions] == ["0", "2", "3", "4", "6"]
    assert found.left_out == 2
    advance(registry, sessions[1], 8)  # it counts, although it is not listed
    fewer = list_sessions(registry, 100.0, most=2)
    assert [one.session[0] for one in fewer.sessions] == ["0", "2"]
    assert (fewer.left_out, fewer.sessions[0].steps_behind) == (5, 8)


def test_a_long_name_is_cut(registry: Registry) -> None:
    registry.find(greet(ANN), "a" * 5000)
    assert len(read(registry)[ANN].owner) == MOST_OWNER


def test_a_session_that_is_leaving_the_memory_is_not_listed(registry: Registry) -> None:
    enter(registry, ANN)
    enter(registry, BOB)
    registry.policy.leave(ANN)
    assert list(read(registry)) == [BOB]
