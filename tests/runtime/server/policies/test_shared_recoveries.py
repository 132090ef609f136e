"""What is left of one model for all clients after a failure: the newest round, the same for all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitonnx.errors import BundleError, ForeignSession, NotSaved, WorkerLost
from splitonnx.messages import Save, TaskKey
from splitonnx.names import ASYNCHRONOUS, SPLITFED_V2, SYNCHRONOUS, TRAIN
from splitonnx.states import read_state
from tests.support.registries import ANN, BOB
from tests.support.shared_models import draw, step_task, tell
from tests.support.shared_scenes import DONE, EVE, JOINED, TIMEOUT, Scene

NAMES = (SPLITFED_V2, SYNCHRONOUS, ASYNCHRONOUS)


def save(scene: Scene, session: str, step: int) -> None:
    scene.policy.save(Save(session=session, step=step))


# --- records ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_round_records_the_whole_model_with_its_version_and_the_sessions_owners(
    name: str,
) -> None:
    scene = Scene(name)
    scene.begin(ANN, BOB)
    scene.make_round(0)
    joint = scene.recorded[-1]
    state = scene.model().executor.state()
    assert set(joint.tensors) == {"W1@own", *state}
    assert {n: joint.tensors[n].tobytes() for n in state} == scene.state()
    assert joint.tensors["W2.m"].any()
    assert joint.version == scene.model().version
    assert joint.owners == {ANN: "a", BOB: "b"}


@pytest.mark.parametrize("name", NAMES)
def test_a_training_that_continues_from_a_record_ends_with_the_same_bits(name: str) -> None:
    calm, rough = Scene(name), Scene(name)
    for scene in (calm, rough):
        scene.begin(ANN, BOB)
        scene.make_round(0)
    rough.train(ANN, 1)  # is lost with the server
    rough.restart()
    for session in (ANN, BOB):
        assert rough.join(session, session[0], generation=2, step=1).step == 1
    ends = []
    for scene in (calm, rough):
        told = [delivery for step in (1, 2) for delivery in scene.make_round(step)]
        joined = [(d.key, d.version, d.tensors[JOINED].tobytes()) for d in told]
        ends.append((joined, scene.state(), scene.model().version))
    assert ends[0] == ends[1]


def test_after_a_crash_a_client_that_lost_its_answer_receives_it_again() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    first = {d.key.session: d for d in scene.make_round(0)}
    scene.restart()
    scene.join(ANN, "a", generation=2)
    (again,) = scene.share(ANN, 1, 99.0, samples=5)
    np.testing.assert_array_equal(again.tensors[JOINED], first[ANN].tensors[JOINED])


@pytest.mark.parametrize("restarts", [False, True])
def test_nobody_joins_with_the_session_of_another_owner(restarts: bool) -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    if restarts:
        scene.restart()
    for other in ("eve", ""):
        with pytest.raises(ForeignSession):
            scene.join(ANN, other, generation=2)
    assert scene.join(ANN, "a", generation=2).owner == "a"


def test_a_session_goes_back_to_the_steps_at_which_it_received_a_round() -> None:
    scene = Scene()
    scene.join(ANN, "a")
    assert scene.policy.list_steps(ANN) == (0,)
    scene.join(BOB, "b")
    for session in (ANN, BOB):
        scene.share(session, 0, 1.0)
    for step in (0, 1):
        scene.make_round(step)
    assert scene.policy.list_steps(ANN) == (2, 1, 0)
    scene.policy.rewind(ANN, 1)
    assert scene.policy.list_steps(ANN) == (1, 0)
    assert scene.model().version == 4  # the model keeps what it learned


# --- saving -----------------------------------------------------------------------------------


def test_only_the_end_of_a_round_can_be_saved() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    save(scene, ANN, 0)
    scene.train(ANN, 0)
    with pytest.raises(NotSaved, match="only the end of a round can be restored"):
        save(scene, ANN, 1)
    scene.train(BOB, 0)
    for session in (ANN, BOB):
        scene.share(session, 1, 1.0, samples=1)
    save(scene, ANN, 1)
    assert len(scene.recorded) == 2  # saving writes nothing that is recorded


def test_what_a_late_client_saves_outlasts_the_server_before_the_next_round() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.train(ANN, 0)
    scene.join(EVE, "e")
    scene.share(EVE, 0, 9.0)
    save(scene, EVE, 0)
    scene.restart()
    assert scene.join(EVE, "e", generation=2, kept=(0,)).step == 0
    assert scene.model(EVE) is scene.model(ANN)
    assert scene.model().version == 0  # as when the round was closed, before Ann's step
    with pytest.raises(ForeignSession):
        scene.join(EVE, "x", generation=3)


def test_a_round_that_could_not_be_recorded_is_saved_when_there_is_room_again() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.refusal = BundleError("rounds", "the disk is full")
    assert len(scene.make_round(0)) == 2
    with pytest.raises(BundleError, match="the disk is full"):
        save(scene, ANN, 1)
    scene.refusal = None
    scene.train(BOB, 1)
    save(scene, ANN, 1)
    scene.restart()
    assert scene.join(ANN, "a", generation=2, kept=(1,)).step == 1
    assert scene.model().version == 2


def test_a_client_s_own_model_is_saved_before_the_first_round(tmp_path: Path) -> None:
    scene = Scene(folder=tmp_path / "server")
    scene.join(ANN, "a")
    save(scene, ANN, 0)
    files = tmp_path / "server" / "sessions" / ANN
    assert list(files.iterdir())
    scene.join(BOB, "b")
    for session in (ANN, BOB):
        scene.share(session, 0, 1.0)
    assert not files.exists() or not list(files.iterdir())  # it trains the one model now


def test_publishing_writes_the_model_as_the_outcome_of_the_client_s_step(tmp_path: Path) -> None:
    scene = Scene(folder=tmp_path / "server")
    scene.begin(ANN, BOB)
    scene.make_round(0)
    scene.train(BOB, 1)
    scene.policy.save(Save(session=ANN, step=1, publish=True))
    written = read_state(tmp_path / "server", scene.bundle.parties["server"].manifest)
    assert written is not None
    assert (written.session, written.owner, written.step) == (ANN, "a", 1)
    assert {n: a.tobytes() for n, a in written.tensors.items()} == scene.state()


def test_without_a_folder_nothing_is_published() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    with pytest.raises(BundleError, match="no folder"):
        scene.policy.save(Save(session=ANN, step=0, publish=True))


# --- a model that is lost with its process -----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_lost_is_restored_as_it_was_recorded(name: str) -> None:
    calm, rough = Scene(name), Scene(name)
    for scene in (calm, rough):
        scene.begin(ANN, BOB)
        scene.make_round(0)
    rough.train(ANN, 1)
    rough.kill()
    for session in (ANN, BOB):
        assert rough.policy.is_lost(session)
        rough.policy.leave(session)
        assert rough.join(session, session[0], generation=2).step == 1
        assert not rough.policy.is_lost(session)
    for scene in (calm, rough):
        scene.make_round(1)
    assert rough.state() == calm.state()
    assert rough.recorded[-1].version == calm.recorded[-1].version


def test_a_session_that_has_not_come_back_yet_does_not_go_on_with_the_restored_model() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.make_round(0)
    scene.train(BOB, 1)
    scene.kill()
    scene.policy.leave(ANN)
    scene.join(ANN, "a", generation=2)
    with pytest.raises(WorkerLost, match="goes back"):
        scene.train(BOB, 2)
    with pytest.raises(WorkerLost):
        scene.share(BOB, 2, 1.0, samples=1)
    with pytest.raises(WorkerLost):
        save(scene, BOB, 1)
    with pytest.raises(WorkerLost):
        scene.predict(BOB, 2)
    assert scene.policy.is_lost(BOB)
    assert scene.train(ANN, 1) == DONE


def test_a_step_that_had_begun_ends_where_another_client_finds_the_model_lost() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.submit(step_task(ANN, {"h": draw(0)["h"]}))
    scene.kill()
    scene.policy.leave(BOB)
    scene.join(BOB, "b", generation=2)
    assert tell(scene.tick()) == [("a", "WorkerLost")]
    with pytest.raises(WorkerLost):
        scene.submit(step_task(ANN, {"labels": draw(0)["labels"]}, turn=1))
    assert scene.train(BOB, 0)[-1] == ("b", "done")


def test_where_a_share_finds_the_model_lost_its_round_is_not_closed_and_all_go_back() -> None:
    """Otherwise, those that wait would wait forever, for a round that nobody has."""
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.make_round(0)
    for session in (ANN, BOB):
        scene.train(session, 1)
    assert scene.share(ANN, 2, 1.0, samples=1) == []
    scene.kill(is_noticed=False)
    with pytest.raises(WorkerLost):
        scene.share(BOB, 2, 1.0, samples=1)
    assert scene.policy.report().closed == 1
    assert tell(scene.tick()) == [("a", "WorkerLost")]
    for session in (ANN, BOB):
        scene.policy.leave(session)
        assert scene.join(session, session[0], generation=2).step == 1
    assert len(scene.make_round(1)) == 2
    assert [joint.number for joint in scene.recorded] == [0, 1, 2]


def test_where_the_time_of_a_round_finds_the_model_lost_those_that_wait_go_back() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.train(ANN, 0)
    scene.share(ANN, 1, 1.0, samples=1)
    scene.kill(is_noticed=False)
    scene.now = TIMEOUT
    with pytest.raises(WorkerLost):
        scene.tick()
    assert tell(scene.tick()) == [("a", "WorkerLost")]
    assert scene.policy.report().closed == 0


def test_where_the_first_round_finds_its_model_lost_it_is_tried_again_with_another() -> None:
    scene = Scene()
    for session in (ANN, BOB):
        scene.join(session, session[0])
    scene.share(BOB, 0, 1.0)
    scene.kill(is_noticed=False)
    with pytest.raises(WorkerLost):
        scene.share(ANN, 0, 1.0)
    assert scene.policy.is_lost(ANN)
    scene.policy.leave(ANN)
    scene.join(ANN, "a", generation=2)
    assert len(scene.share(ANN, 0, 1.0)) == 2
    assert scene.train(ANN, 0) == DONE


# --- clients that return with a round's tensors that no record says they have --------------------


def come_back(scene: Scene) -> None:
    """Have Eve receive a round's tensors, and return after the server was lost."""
    scene.begin(ANN, BOB)
    scene.join(EVE, "e")
    scene.share(EVE, 0, 9.0)
    scene.restart()
    for session in (ANN, BOB, EVE):
        scene.join(session, session[0], generation=2)


def test_who_returns_with_a_round_s_tensors_trains_and_predicts_with_the_one_model() -> None:
    scene = Scene()
    come_back(scene)
    assert scene.train(EVE, 0)[-1] == ("e", "done")
    assert scene.model(EVE) is scene.model(ANN)
    assert (scene.predict(EVE) == scene.predict(ANN)).all()
    assert scene.policy.list_steps(EVE) == ()
    with pytest.raises(NotSaved):
        save(scene, EVE, 1)


def test_a_step_of_who_returns_with_a_round_s_tensors_can_be_withdrawn() -> None:
    scene = Scene()
    come_back(scene)
    halves = ({"h": draw(0)["h"]}, {"labels": draw(0)["labels"]})
    scene.submit(step_task(EVE, halves[0]))
    scene.policy.withdraw(TaskKey(EVE, TRAIN, 0, 0))
    scene.submit(step_task(EVE, halves[0]))
    told = tell(scene.submit(step_task(EVE, halves[1], turn=1)))
    assert told == [("e", "h.grad loss"), ("e", "done")]
