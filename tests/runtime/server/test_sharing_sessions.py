"""Clients that share: what each receives, what a hostile one gains, what a crash leaves."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from splitonnx.messages import Bye, Fault, Saved, Welcome
from splitonnx.names import OWN
from splitonnx.sharing import LEAVES, ROUND, SAMPLES, name_joined
from tests.support import tiny
from tests.support.sharers import BATCH, WEIGHT, Sharer, Table

ANN, BOB, EVE = "a" * 32, "b" * 32, "e" * 32
JOINED = name_joined(WEIGHT)


def sit_down(table: Table, *names: str) -> list[Sharer]:
    """Have clients greet and receive the model that all of them start from."""
    sharers = [Sharer(table, name) for name in names]
    replies = [reply for sharer in sharers for reply in sharer.share(0, samples=0)]
    assert [int(tensors[ROUND]) for _, tensors in replies] == [0]  # the others' came unasked
    assert all(int(s.heard.pop()[ROUND]) == 0 for s in sharers[:-1])
    return sharers


def read(tensors: dict[str, np.ndarray]) -> tuple[int, float]:
    """Return the number of the round and the value that all of the joined weight has."""
    (value,) = set(tensors[JOINED].ravel().tolist())
    return int(tensors[ROUND]), value


def test_both_parts_are_joined_by_samples_and_both_sides_have_them() -> None:
    table = Table()
    ann, bob = sit_down(table, ANN, BOB)
    ann.train(0)
    trained = table.read(ANN)["W2"]
    untrained = table.read(BOB)["W2"]
    assert ann.share(1, 1.0, samples=3) == []
    ((_, tensors),) = bob.share(0, 5.0)  # at its own step
    assert read(tensors) == (0, 0.0)  # it has trained nothing since
    bob.train(0)
    ((_, tensors),) = bob.share(1, 5.0, samples=1)
    assert read(tensors) == read(ann.heard[-1]) == (1, 2.0)
    assert (trained != untrained).any()
    for name in (ANN, BOB):
        np.testing.assert_array_equal(table.read(name)["W2"], trained)  # both made the same step


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({SAMPLES: np.array(2**62)}, "RemoteProtocolError"),
        ({SAMPLES: np.array(-1)}, "RemoteProtocolError"),
        ({LEAVES: np.array(2)}, "RemoteProtocolError"),
        ({SAMPLES: None}, "RemoteProtocolError"),
        ({f"{WEIGHT}{OWN}": None}, "RemoteProtocolError"),
        ({"W2@own": np.zeros((4, 2), np.float32)}, "RemoteProtocolError"),
        ({f"{WEIGHT}{OWN}": np.zeros((9, 9), np.float32)}, "ArrayMismatch"),
        ({f"{WEIGHT}{OWN}": np.full((3, 4), np.nan, np.float32)}, "NotFinite"),
        ({f"{WEIGHT}{OWN}": np.full((3, 4), np.inf, np.float32)}, "NotFinite"),
    ],
)
def test_a_share_that_is_not_as_declared_is_refused_and_spoils_no_round(
    changes: dict[str, np.ndarray | None], code: str
) -> None:
    table = Table()
    ann, eve = sit_down(table, ANN, EVE)
    ann.train(0)
    eve.train(0)
    ann.share(1, 1.0)
    ((fault, _),) = eve.share(1, 9.0, changes=changes)
    assert isinstance(fault, Fault)
    assert fault.code == code
    assert ann.heard == []  # it still waits
    ((_, tensors),) = Sharer(table, EVE, step=1, generation=2).share(1, 3.0)
    assert read(tensors) == read(ann.heard[-1]) == (1, 2.0)


def test_in_the_middle_of_a_step_nothing_is_shared() -> None:
    table = Table()
    _, eve = sit_down(table, ANN, EVE)
    eve.begin(0)
    ((fault, _),) = eve.share(0, 9.0)
    assert isinstance(fault, Fault)
    assert "it shares at step 0" in fault.reason


def test_a_client_that_trains_while_its_share_waits_takes_the_share_back() -> None:
    table = Table()
    ann, eve = sit_down(table, ANN, EVE)
    for sharer in (ann, eve):
        sharer.train(0)
    eve.share(1, 99.0)
    eve.train(1)
    assert ann.share(1, 1.0) == []
    ((_, tensors),) = eve.share(2, 3.0)
    assert read(tensors) == read(ann.heard[-1]) == (1, 2.0)


def test_nobody_shares_for_a_session_of_another_owner() -> None:
    table = Table()
    Sharer(table, ANN, owner="ann")
    fault = Sharer(table, ANN, owner="eve", generation=2).greeting
    assert isinstance(fault, Fault)
    assert fault.code == "ForeignSession"


def test_a_client_that_lost_its_answer_receives_it_again_on_its_next_connection() -> None:
    table = Table()
    ann, bob = sit_down(table, ANN, BOB)
    for sharer in (ann, bob):
        sharer.train(0)
    ann.share(1, 1.0)
    again = Sharer(table, ANN, step=1, generation=2)  # its share waits no longer
    assert bob.share(1, 3.0) == []
    ((_, tensors),) = again.share(1, 1.0)
    assert read(tensors) == read(bob.heard[-1]) == (1, 2.0)
    ((_, tensors),) = Sharer(table, ANN, step=1, generation=3).share(1, 99.0)
    assert read(tensors) == (1, 2.0)


def test_a_client_that_never_returns_stops_no_round() -> None:
    table = Table(clients=3, quorum=2)
    ann, bob, _ = sit_down(table, ANN, BOB, EVE)
    for sharer in (ann, bob):
        sharer.train(0)
    ann.share(1, 1.0)
    bob.share(1, 3.0)
    assert ann.heard == bob.heard == []
    table.tick()
    assert read(ann.heard[-1]) == read(bob.heard[-1]) == (1, 2.0)
    assert table.registry.policy.report().members == 2


def test_a_goodbye_in_the_middle_of_a_round_closes_it() -> None:
    table = Table()
    ann, bob = sit_down(table, ANN, BOB)
    ann.train(0)
    ann.share(1, 1.0)
    bob.say(Bye())
    table.tick()
    assert read(ann.heard[-1]) == (1, 1.0)


def test_a_session_that_left_the_memory_is_still_waited_for() -> None:
    table = Table()
    ann, _ = sit_down(table, ANN, BOB)
    ann.train(0)
    table.registry.policy.leave(BOB)
    ann.share(1, 1.0)
    assert table.registry.policy.report().members == 2
    assert ann.heard == []


@pytest.mark.parametrize("is_replaced", [False, True], ids=["full", "replaced"])
def test_a_round_that_cannot_be_recorded_is_told_in_the_log_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_replaced: bool
) -> None:
    table = Table(tmp_path / "server")
    ann, bob = sit_down(table, ANN, BOB)
    shutil.rmtree(tmp_path / "server" / "rounds")
    if is_replaced:
        (tmp_path / "server" / "manifest.json").unlink()
    else:
        (tmp_path / "server" / "rounds").write_bytes(b"")  # no folder can be made there
    for sharer in (ann, bob):
        sharer.train(0)
    with caplog.at_level(logging.ERROR):
        ann.share(1, 1.0)
        ((_, tensors),) = bob.share(1, 3.0)
    assert read(tensors) == read(ann.heard[-1]) == (1, 2.0)
    assert "round 1 is kept in memory alone" in caplog.text


def welcome(table: Table, session: str, step: int, kept: tuple[int, ...]) -> tuple[Sharer, int]:
    """Have a client return, and tell at which step it continues."""
    sharer = Sharer(table, session, step=step, kept=kept, generation=2)
    assert isinstance(sharer.greeting, Welcome), sharer.greeting
    return sharer, sharer.greeting.step


def test_after_a_crash_clients_receive_the_same_round_again(tmp_path: Path) -> None:
    table = Table(tmp_path / "server")
    sharers = sit_down(table, ANN, BOB)
    for sharer in sharers:
        assert isinstance(sharer.save(0), Saved)
        sharer.train(0)
        sharer.share(1, float(sharer is sharers[0]))
    table.open(resume=True)
    ann, step = welcome(table, ANN, 1, (0,))
    assert step == 0
    ann.train(0)
    ((_, tensors),) = ann.share(1, 77.0)  # what it learned is in there already
    assert read(tensors) == (1, 0.5)


def test_a_state_from_before_a_share_is_not_taken_for_the_one_after_it(tmp_path: Path) -> None:
    table = Table(tmp_path / "server")
    ann, bob = sit_down(table, ANN, BOB)
    for sharer in (ann, bob):
        sharer.save(0)
    ann.train(0)
    ann.share(1, 1.0)  # waits, when the server stops in good order
    table.registry.unload_all()
    table.open(resume=True)
    ann, step = welcome(table, ANN, 1, (0,))
    assert step == 1  # nothing was lost
    bob, _ = welcome(table, BOB, 0, (0,))
    ann.share(1, 1.0)
    ((_, tensors),) = bob.share(0, samples=0)
    assert read(tensors) == (0, 0.0)
    bob.say(Bye())
    table.tick()
    assert read(ann.heard[-1]) == (1, 1.0)
    table.open(resume=True)  # killed, before Ann's copy with the joined tensors was written
    assert welcome(table, ANN, 1, (0,))[1] == 0


def train_a_round(folder: Path) -> tuple[Table, Sharer]:
    """Have one client train the first round, and return the server and the client."""
    table = Table(folder, clients=1)
    ann = Sharer(table, ANN)
    ann.share(0, samples=0)
    ann.train(0)
    ann.share(1, 1.0)
    return table, ann


@pytest.mark.parametrize("is_saved", [False, True])
def test_after_a_crash_before_its_first_step_a_client_trains_with_the_joined_model(
    tmp_path: Path, is_saved: bool
) -> None:
    table, _ = train_a_round(tmp_path / "server")
    eve = Sharer(table, EVE)
    if is_saved:
        eve.save(0)  # before it asks for the model
    ((_, tensors),) = eve.share(0, samples=0)
    assert read(tensors) == (1, 1.0)
    table.open(resume=True)
    eve, step = welcome(table, EVE, 0, (0,) if is_saved else ())  # it has the model, and goes on
    assert step == 0
    eve.train(0)
    bob = Sharer(table, BOB)
    bob.share(0, samples=0)
    bob.train(0)
    np.testing.assert_array_equal(table.read(EVE)["W2"], table.read(BOB)["W2"])


def test_a_client_that_has_not_asked_for_the_joined_model_predicts_with_its_own(
    tmp_path: Path,
) -> None:
    table, ann = train_a_round(tmp_path / "server")
    eve = Sharer(table, EVE)
    np.testing.assert_allclose(eve.predict()["y"], BATCH["h"] @ tiny.WEIGHTS["W2"], rtol=1e-6)
    assert (ann.predict()["y"] != eve.predict()["y"]).any()


def test_a_server_that_forgets_its_sessions_begins_with_a_first_round(tmp_path: Path) -> None:
    table = Table(tmp_path / "server")
    for sharer in sit_down(table, ANN, BOB):
        sharer.train(0)
        sharer.share(1, 9.0)
    table.open(resume=False)
    ann, step = welcome(table, ANN, 1, ())
    assert step == 0
    assert ann.share(0, 1.0, samples=0) == []
    ((_, tensors),) = Sharer(table, EVE).share(0, 3.0, samples=0)
    assert read(tensors) == read(ann.heard[-1]) == (0, 2.0)
    assert isinstance(Sharer(table, BOB, step=1, kept=(1,)).greeting, Fault)  # SessionLost
