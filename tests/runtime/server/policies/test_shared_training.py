"""One model for all clients: how it begins, whose steps it makes, and whom its rounds wait for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitonnx.errors import RemoteProtocolError
from splitonnx.messages import TaskKey
from splitonnx.names import ASYNCHRONOUS, SHARE, SPLITFED_V2, SYNCHRONOUS, TRAIN
from splitonnx.runtime.server.policies.tasks import Joined
from splitonnx.sharing import ROUND
from tests.support import tiny
from tests.support.registries import ANN, BOB
from tests.support.shared_models import draw, step_task, tell
from tests.support.shared_scenes import DONE, EVE, JOINED, TIMEOUT, Scene
from tests.support.sharing import share_task


def test_before_the_first_round_each_client_predicts_with_its_own_model_and_trains_nothing() -> (
    None
):
    scene = Scene()
    scene.join(ANN)
    weights = tiny.WEIGHTS["W2"]
    np.testing.assert_allclose(scene.predict(ANN), draw(0)["h"] @ weights, rtol=1e-5)
    with pytest.raises(RemoteProtocolError, match="before it has received the joined model"):
        scene.train(ANN, 0)
    assert scene.policy.report_members()[ANN].round is None


def test_all_train_one_model_whose_version_counts_the_steps_of_all() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    assert scene.model(ANN) is scene.model(BOB)
    assert scene.train(ANN, 0) == DONE
    assert scene.train(BOB, 0)[-1] == ("b", "done")
    assert scene.train(ANN, 1) == DONE
    assert scene.model().version == 3
    assert (scene.predict(ANN) == scene.predict(BOB)).all()
    np.testing.assert_allclose(
        scene.predict(ANN), draw(0)["h"] @ scene.model().read(["W2"])["W2"], rtol=1e-5
    )


def test_the_first_round_begins_with_the_model_of_the_client_that_has_made_the_most_steps(
    tmp_path: Path,
) -> None:
    scene = Scene(folder=tmp_path / "server", clients=3)
    for session in (ANN, BOB, EVE):
        scene.join(session)
    trained = scene.model(BOB).executor
    values = {n: np.full_like(a, 7.0) for n, a in trained.state().items()}
    trained.restore(values, 40)
    for session, step in ((ANN, 3), (BOB, 40), (EVE, 0)):
        scene.share(session, step, float(step))
    assert len({id(scene.model(session)) for session in (ANN, BOB, EVE)}) == 1
    assert scene.model().version == 40
    assert (scene.model().read(["W2"])["W2"] == 7.0).all()


def test_who_comes_later_trains_the_same_model_once_it_has_received_a_round_s_tensors() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.train(ANN, 0)
    scene.join(EVE)
    assert scene.model(EVE) is not scene.model(ANN)
    (delivery,) = scene.share(EVE, 0, 9.0)
    assert (delivery.tensors[JOINED] == 1.0).all()
    assert delivery.version == 1
    assert scene.model(EVE) is scene.model(ANN)


@pytest.mark.parametrize(
    ("name", "is_joint"), [(SPLITFED_V2, False), (SYNCHRONOUS, True), (ASYNCHRONOUS, False)]
)
def test_sessions_are_told_that_others_train_their_model(name: str, is_joint: bool) -> None:
    joined = Scene(name).join(ANN, "ann")
    assert joined == Joined(owner="ann", step=0, is_shared=True, is_joint=is_joint)


def test_a_round_joins_the_clients_parts_and_leaves_the_model_as_it_is() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.train(ANN, 0)
    scene.train(BOB, 0)
    before = scene.state()
    assert scene.share(ANN, 1, 2.0, samples=1) == []
    told = scene.share(BOB, 1, 8.0, samples=2)
    assert {d.key for d in told} == {TaskKey(n, SHARE, 1, 0) for n in (ANN, BOB)}
    for delivery in told:
        assert (delivery.tensors[JOINED] == 6.0).all()
        assert (int(delivery.tensors[ROUND]), delivery.version) == (1, 2)
    assert scene.state() == before


def test_joint_steps_wait_for_the_clients_that_still_train_in_the_round() -> None:
    scene = Scene(SYNCHRONOUS)
    scene.begin(ANN, BOB)
    assert scene.train(ANN, 0) == []
    assert sorted(scene.train(BOB, 0)) == [("a", "h.grad loss done"), ("b", "h.grad loss done")]
    assert scene.model().version == 1
    scene.share(ANN, 1, 1.0, samples=1)  # Ann waits for the round, and Bob trains alone
    assert scene.train(BOB, 1) == [("b", "h.grad loss done")]


def test_who_is_left_out_of_a_joint_step_is_not_waited_for_by_the_round() -> None:
    scene = Scene(SYNCHRONOUS)
    scene.begin(ANN, BOB)
    scene.train(ANN, 0)
    scene.now = TIMEOUT
    assert tell(scene.tick()) == [("a", "h.grad loss done")]
    assert scene.policy.report().members == 1
    (delivery,) = scene.share(ANN, 1, 3.0, samples=1)
    assert (delivery.tensors[JOINED] == 3.0).all()


def test_who_is_silent_in_a_step_is_not_waited_for_by_the_round() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.submit(step_task(ANN, {"h": draw(0)["h"]}))
    assert scene.train(BOB, 0) == []
    scene.now = TIMEOUT
    assert tell(scene.tick()) == [("a", "StepEnded"), ("b", "h.grad loss"), ("b", "done")]
    assert scene.policy.report().members == 1


def test_asynchronous_shares_are_answered_at_once_until_a_client_is_too_far_ahead() -> None:
    scene = Scene(ASYNCHRONOUS)
    scene.begin(ANN, BOB)
    scene.train(ANN, 0)
    (delivery,) = scene.share(ANN, 1, 11.0, samples=1)
    np.testing.assert_allclose(delivery.tensors[JOINED], 0.4 * 1.0 + 0.6 * 11.0, rtol=1e-6)
    scene.train(ANN, 1)
    assert scene.share(ANN, 2, 0.0, samples=1) == []  # joined and recorded, but not answered
    assert [joint.number for joint in scene.recorded] == [0, 1, 2]
    scene.train(BOB, 0)
    assert {d.key.session for d in scene.share(BOB, 1, 0.0, samples=1)} == {ANN, BOB}


def test_a_step_that_is_withdrawn_changes_nothing_and_frees_the_model() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.submit(step_task(ANN, {"h": draw(0)["h"]}))
    assert scene.train(BOB, 0) == []
    scene.policy.withdraw(TaskKey(ANN, TRAIN, 0, 0))
    assert tell(scene.tick()) == [("b", "h.grad loss"), ("b", "done")]
    assert scene.model().version == 1


def test_what_is_withdrawn_while_a_thread_works_is_aborted_by_that_thread() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.submit(step_task(BOB, {"h": draw(0)["h"]}))
    deliveries = scene.policy.submit(share_task(ANN, 0, 1.0))
    next(deliveries)  # it holds the model
    scene.policy.withdraw(TaskKey(BOB, TRAIN, 0, 0))
    list(deliveries)
    assert scene.train(ANN, 0) == DONE


def test_rounds_forget_a_session_that_has_ended() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.train(ANN, 0)
    scene.share(ANN, 1, 5.0, samples=1)
    scene.policy.finish(BOB)
    scene.policy.leave(BOB)
    assert [d.key.session for d in scene.tick()] == [ANN]
    assert set(scene.policy.report_members()) == {ANN}
    assert scene.policy.list_steps(BOB) == ()


def test_a_client_whose_model_the_first_round_chose_may_leave() -> None:
    scene = Scene()
    scene.begin(ANN, BOB)
    scene.policy.finish(ANN)
    scene.policy.leave(ANN)
    assert scene.train(BOB, 0)[-1] == ("b", "done")
