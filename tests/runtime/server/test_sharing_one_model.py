"""Clients that train one model on a server: what they save, and what a crash leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitonnx.messages import Bye, Fault, Saved, Unsaved, Welcome
from splitonnx.names import ASYNCHRONOUS, SPLITFED_V2, SYNCHRONOUS
from splitonnx.sharing import ROUND, name_joined
from tests.support.sharers import WEIGHT, Sharer, Table

ANN, BOB, EVE = "a" * 32, "b" * 32, "e" * 32
NAMES = (SPLITFED_V2, SYNCHRONOUS, ASYNCHRONOUS)


def sit_down(folder: Path, policy: str) -> tuple[Table, Sharer, Sharer]:
    """Have two clients greet, and receive what they start from."""
    table = Table(folder, policy=policy)
    ann, bob = Sharer(table, ANN), Sharer(table, BOB)
    for sharer in (ann, bob):
        sharer.share(0, samples=0)
    return table, ann, bob


def make_round(ann: Sharer, bob: Sharer, step: int) -> list[tuple[int, float]]:
    """Have both make a step and share, and return which round and which value they receive."""
    for sharer in (ann, bob):
        sharer.heard.clear()
        sharer.train(step)
    found = []
    for sharer, value in ((ann, 1.0), (bob, 3.0)):
        found += [tensors for _, tensors in sharer.share(step + 1, value)]
    found += [tensors for s in (ann, bob) for tensors in s.heard if ROUND in tensors]
    return [(int(t[ROUND]), float(t[name_joined(WEIGHT)].ravel()[0])) for t in found]


def list_bits(table: Table, session: str) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in table.read(session).items()}


def greeted_at(sharer: Sharer) -> int:
    assert isinstance(sharer.greeting, Welcome), sharer.greeting
    return sharer.greeting.step


@pytest.mark.parametrize("policy", NAMES)
def test_after_a_crash_all_continue_at_the_newest_round(tmp_path: Path, policy: str) -> None:
    table, ann, bob = sit_down(tmp_path / "server", policy)
    told = make_round(ann, bob, 0)
    assert len(told) == 2
    if policy != ASYNCHRONOUS:
        assert told == [(1, 2.0)] * 2
    assert ann.save(1) == Saved(session=ANN, step=1)
    before = list_bits(table, ANN)
    ann.train(1)  # is lost with the server
    table.open(resume=True)
    ann = Sharer(table, ANN, step=2, kept=(1, 0), generation=2)
    bob = Sharer(table, BOB, step=1, kept=(1, 0), generation=2)
    assert [greeted_at(sharer) for sharer in (ann, bob)] == [1, 1]
    assert list_bits(table, BOB) == before
    assert len(make_round(ann, bob, 1)) == 2


def test_a_checkpoint_inside_a_round_is_refused_and_training_continues(tmp_path: Path) -> None:
    _, ann, bob = sit_down(tmp_path / "server", SPLITFED_V2)
    ann.train(0)
    answer = ann.save(1)
    assert isinstance(answer, Unsaved)
    assert "only the end of a round can be restored" in answer.reason
    ann.train(1)
    bob.train(0)
    ann.share(2, 1.0)
    assert len(bob.share(1, 1.0)) == 1
    assert ann.save(2) == Saved(session=ANN, step=2)


def test_a_late_client_that_saved_its_start_continues_after_a_crash(tmp_path: Path) -> None:
    table, ann, bob = sit_down(tmp_path / "server", SPLITFED_V2)
    make_round(ann, bob, 0)
    eve = Sharer(table, EVE)
    eve.share(0, samples=0)
    assert eve.save(0) == Saved(session=EVE, step=0)
    eve.train(0)
    table.open(resume=True)
    assert greeted_at(Sharer(table, EVE, step=1, kept=(0,), generation=2)) == 0


def test_another_owner_cannot_take_a_recorded_session(tmp_path: Path) -> None:
    table = Table(tmp_path / "server", policy=SPLITFED_V2, clients=1)
    ann = Sharer(table, ANN, owner="ann")
    ann.share(0, samples=0)
    table.open(resume=True)
    fault = Sharer(table, ANN, owner="eve", generation=2).greeting
    assert isinstance(fault, Fault)
    assert fault.code == "ForeignSession"
    assert greeted_at(Sharer(table, ANN, owner="ann", generation=3)) == 0


def test_a_goodbye_in_the_middle_of_a_joint_step_lets_the_others_go_on(tmp_path: Path) -> None:
    table, ann, bob = sit_down(tmp_path / "server", SYNCHRONOUS)
    ann.heard.clear()
    ann.train(0)
    bob.say(Bye())
    table.tick()
    assert [set(tensors) for tensors in ann.heard] == [{"h.grad", "loss"}]


def test_a_client_killed_in_its_first_joint_step_makes_it_with_what_it_received_then(
    tmp_path: Path,
) -> None:
    """It has no checkpoint of after the first round, and asks for that round's tensors again."""
    table, ann, bob = sit_down(tmp_path / "server", SYNCHRONOUS)
    start = float(ann.heard[0][name_joined(WEIGHT)].ravel()[0])
    assert make_round(ann, bob, 0) == [(1, 2.0)] * 2
    (first,) = [tensors for tensors in ann.heard if "h.grad" in tensors]
    again = Sharer(table, ANN, kept=(0,), generation=2)
    assert greeted_at(again) == 0
    ((_, tensors),) = again.share(0, samples=0)
    assert (int(tensors[ROUND]), float(tensors[name_joined(WEIGHT)].ravel()[0])) == (0, start)
    ((_, tensors),) = again.train(0)
    assert tensors["h.grad"].tobytes() == first["h.grad"].tobytes()
    ((_, tensors),) = again.share(1, 1.0)
    assert int(tensors[ROUND]) == 1
    assert len(make_round(again, bob, 1)) == 2
