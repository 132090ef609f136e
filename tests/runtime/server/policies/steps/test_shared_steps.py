"""Steps of many clients on one model: which runs when, what each client is told, what ends them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import StageFailed, StepEnded, WorkerLost
from splitonnx.names import SERVER
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.server.policies.models import ServerModel
from splitonnx.runtime.server.policies.steps.joint_batches import BatchLayout
from splitonnx.runtime.server.policies.steps.shared_steps import SharedSteps
from splitonnx.runtime.server.policies.tasks import Delivery, Task
from tests.support import tiny
from tests.support.shared_models import draw, make_model, step_task, tell
from tests.support.zoo import ZOO

ANN, BOB, EVE = "a" * 32, "b" * 32, "e" * 32
UP, DOWN = "act1@server", "act3@client_grad"
BACK, FORTH = "act1@server_grad", "act3@client"


@pytest.fixture(scope="module")
def u_shaped() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


class Scene:
    """Steps on one model at the test's own time; joint steps wait for the sessions ``awaited``."""

    def __init__(
        self, bundle: Bundle, *, joint: bool = False, quorum: int = 1, timeout: float | None = 10.0
    ) -> None:
        assert bundle.server is not None
        self.model: ServerModel = make_model(bundle)
        layout = BatchLayout(bundle.server.manifest) if joint else None
        self.steps = SharedSteps(layout=layout, quorum=quorum, timeout=timeout)
        self.awaited: set[str] = {ANN, BOB}
        self.now = 0.0

    def submit(self, task: Task) -> list[Delivery]:
        self.steps.add(task, self.now)
        return self.run()

    def run(self) -> list[Delivery]:
        return list(self.steps.run(self.model, self.awaited, self.now))

    def say(
        self, session: str, tensors: Mapping[str, np.ndarray], turn: int = 0, step: int = 0
    ) -> list[tuple[str, str]]:
        """Send a message, and tell what comes of it."""
        return tell(self.submit(step_task(session, tensors, turn=turn, step=step)))

    def weights(self) -> np.ndarray:
        return self.model.read(["W2"])["W2"]


def first(session_number: int = 0, rows: int = 2) -> dict[str, np.ndarray]:
    """Return the first message of a U-shaped step."""
    return {UP: np.full((rows, 7), 1.0 + session_number, np.float32)}


def second(rows: int = 2) -> dict[str, np.ndarray]:
    return {DOWN: np.ones((rows, 6), np.float32)}


# --- one by one -------------------------------------------------------------------------------


def test_steps_run_one_after_the_other_on_one_model() -> None:
    scene = Scene(tiny.split_bundle())
    assert scene.say(ANN, draw(0)) == [("a", "h.grad loss"), ("a", "done")]
    assert scene.say(BOB, draw(1)) == [("b", "h.grad loss"), ("b", "done")]
    state = tiny.reference_state()
    for seed in (0, 1):  # by hand, in float64
        sent = draw(seed)
        h, labels = sent["h"].astype(np.float64), sent["labels"]
        difference = h @ state["W2"] - labels
        gradient = h.T @ (2 * difference / difference.size)
        state["W2.m"] = 0.9 * state.get("W2.m", 0) + gradient
        state["W2"] = state["W2"] - 0.1 * state["W2.m"]
    np.testing.assert_allclose(scene.weights(), state["W2"], rtol=1e-5)
    assert scene.model.version == 2


def test_the_learning_rates_of_steps_one_by_one_may_differ() -> None:
    scene = Scene(tiny.split_bundle())
    for session, rate in ((ANN, 0.1), (BOB, 0.2)):
        scene.submit(step_task(session, draw(0), rate=rate))
    assert scene.model.version == 2


def test_another_client_s_step_waits_until_the_one_that_has_begun_has_ended(
    u_shaped: Bundle,
) -> None:
    scene = Scene(u_shaped)
    assert scene.say(ANN, first()) == [("a", FORTH)]
    assert scene.say(EVE, first()) == []
    assert scene.say(BOB, first()) == []
    assert scene.say(ANN, second(), turn=1) == [
        ("a", BACK), ("a", "done"), ("e", FORTH)  # Eve came before Bob
    ]  # fmt: skip
    assert scene.say(EVE, second(), turn=1) == [("e", BACK), ("e", "done"), ("b", FORTH)]
    assert scene.say(BOB, second(), turn=1) == [("b", BACK), ("b", "done")]
    assert scene.model.version == 3


def test_a_message_that_continues_a_step_may_come_before_the_step_has_begun() -> None:
    scene = Scene(tiny.split_bundle())
    whole = draw(0)
    halves = ({"h": whole["h"]}, {"labels": whole["labels"]})
    assert scene.say(ANN, halves[0]) == []
    for turn in (0, 1):
        assert scene.say(BOB, halves[turn], turn=turn) == []
    assert scene.say(ANN, halves[1], turn=1) == [
        ("a", "h.grad loss"), ("a", "done"), ("b", "h.grad loss"), ("b", "done")
    ]  # fmt: skip


def test_a_message_of_a_step_that_was_ended_is_answered_with_that(u_shaped: Bundle) -> None:
    scene = Scene(u_shaped)
    scene.say(ANN, first())
    scene.steps.withdraw(scene.model, step_task(ANN, {}).key)
    with pytest.raises(StepEnded):
        scene.say(ANN, second(), turn=1)
    assert scene.say(ANN, first()) == [("a", FORTH)]  # it begins again
    assert scene.say(ANN, second(), turn=1) == [("a", BACK), ("a", "done")]


def test_the_next_step_begins_where_the_one_before_it_is_withdrawn(u_shaped: Bundle) -> None:
    scene = Scene(u_shaped)
    scene.say(ANN, first())
    scene.say(BOB, first())
    scene.steps.withdraw(scene.model, step_task(ANN, {}).key)
    assert tell(scene.run()) == [("b", FORTH)]
    assert scene.model.version == 0


def test_a_step_that_waits_and_is_withdrawn_never_runs(u_shaped: Bundle) -> None:
    scene = Scene(u_shaped)
    scene.say(ANN, first())
    scene.say(BOB, first())
    scene.steps.withdraw(scene.model, step_task(BOB, {}).key)
    assert scene.say(ANN, second(), turn=1) == [("a", BACK), ("a", "done")]
    assert tell(scene.run()) == []


def test_a_client_that_is_silent_in_its_step_does_not_hold_the_others_for_long(
    u_shaped: Bundle,
) -> None:
    scene = Scene(u_shaped, timeout=10.0)
    scene.say(ANN, first())
    scene.say(BOB, first())
    assert scene.steps.end_if_silent(scene.model, 9.9) == ()
    assert scene.steps.end_if_silent(scene.model, 10.0) == (ANN,)
    scene.now = 10.0
    assert tell(scene.run()) == [("a", "StepEnded"), ("b", FORTH)]
    scene.now = 19.9  # Bob's time began when his step did
    assert scene.steps.end_if_silent(scene.model, scene.now) == ()


def test_without_a_timeout_nobody_is_too_slow(u_shaped: Bundle) -> None:
    scene = Scene(u_shaped, timeout=None)
    scene.say(ANN, first())
    assert scene.steps.end_if_silent(scene.model, 1e18) == ()


def test_a_step_that_fails_is_told_its_client_and_changes_nothing() -> None:
    scene = Scene(tiny.split_bundle())
    before = scene.weights().copy()
    broken = {**draw(0), "h": np.ones((2, 9), np.float32)}
    ((session, error),) = scene.say(ANN, broken)
    assert (session, error != "done") == ("a", True)
    assert scene.model.version == 0
    np.testing.assert_array_equal(scene.weights(), before)
    assert scene.say(BOB, draw(1))[-1] == ("b", "done")


def test_a_reply_that_cannot_be_taken_ends_the_step_and_the_next_one_runs(
    u_shaped: Bundle,
) -> None:
    scene = Scene(u_shaped)
    scene.steps.add(step_task(ANN, first()), 0.0)
    deliveries = scene.steps.run(scene.model, (), 0.0)
    next(deliveries)
    deliveries.close()  # type: ignore[attr-defined]
    assert scene.say(BOB, first()) == [("a", "StepEnded"), ("b", FORTH)]


# --- joint steps ------------------------------------------------------------------------------


def test_a_joint_step_waits_for_all_and_is_one_step_of_their_rows() -> None:
    scene, whole = Scene(tiny.split_bundle(), joint=True), Scene(tiny.split_bundle())
    scene.awaited = {ANN, BOB, EVE}
    sent = {ANN: draw(0, 3), BOB: draw(1, 1), EVE: draw(2, 4)}
    assert scene.say(ANN, sent[ANN]) == []
    assert scene.say(BOB, sent[BOB]) == []
    told = scene.submit(step_task(EVE, sent[EVE]))
    assert sorted(tell(told)) == [(name, "h.grad loss done") for name in "abe"]
    rows = {name: np.concatenate([part[name] for part in sent.values()]) for name in sent[ANN]}
    (computed, _) = whole.submit(step_task(ANN, rows))
    np.testing.assert_allclose(scene.weights(), whole.weights(), rtol=1e-6)
    ends = {ANN: (0, 3), BOB: (3, 4), EVE: (4, 8)}
    for delivery in told:
        start, end = ends[delivery.key.session]
        own = computed.tensors["h.grad"][start:end] * 8 / (end - start)
        np.testing.assert_allclose(delivery.tensors["h.grad"], own, rtol=1e-5, atol=1e-7)
    assert scene.model.version == 1


def test_a_joint_u_shaped_step_continues_when_all_have_continued(u_shaped: Bundle) -> None:
    scene = Scene(u_shaped, joint=True)
    assert scene.say(ANN, first(0)) == []
    assert sorted(scene.say(BOB, first(1, 3))) == [("a", FORTH), ("b", FORTH)]
    assert scene.say(BOB, second(3), turn=1) == []
    told = scene.say(ANN, second(2), turn=1)
    assert sorted(told) == [("a", f"{BACK} done"), ("b", f"{BACK} done")]
    assert scene.model.version == 1


def test_a_joint_step_has_the_same_bits_whatever_its_clients_are_called() -> None:
    states = []
    for names in ((ANN, BOB, EVE), (EVE, ANN, BOB), (BOB, EVE, ANN)):
        for order in ((0, 1, 2), (2, 0, 1)):
            scene = Scene(tiny.split_bundle(), joint=True)
            scene.awaited = {ANN, BOB, EVE}
            for number in order:
                sent = draw(number, rows=3 + number)
                task = step_task(names[number], sent, seed=number)
                told = scene.submit(task)
            assert len(told) == 3
            states.append(scene.weights().tobytes())
    assert len(set(states)) == 1


def test_when_its_time_is_over_a_joint_step_goes_without_those_that_are_late() -> None:
    scene = Scene(tiny.split_bundle(), joint=True, quorum=2, timeout=10.0)
    scene.awaited = {ANN, BOB, EVE}
    assert scene.say(ANN, draw(0)) == []
    scene.now = 50.0
    assert tell(scene.run()) == []  # one is no quorum
    assert sorted(scene.say(BOB, draw(1))) == [("a", "h.grad loss done"), ("b", "h.grad loss done")]
    assert scene.steps.take_left_out() == {EVE}
    assert scene.steps.take_left_out() == frozenset()
    scene.awaited = {ANN, BOB}
    scene.say(ANN, draw(0), step=1)
    scene.now = 59.9
    assert tell(scene.run()) == []  # the time of this step began with Ann's message
    scene.now = 60.0
    assert tell(scene.run()) == []  # two of two are the quorum
    assert len(scene.say(EVE, draw(2))) == 2  # and Eve is one of those that are there
    assert scene.steps.take_left_out() == {BOB}


def test_the_quorum_of_a_joint_step_is_at_most_all_that_are_left() -> None:
    scene = Scene(tiny.split_bundle(), joint=True, quorum=3, timeout=10.0)
    scene.awaited = {ANN}
    assert scene.say(ANN, draw(0)) == [("a", "h.grad loss done")]


def test_who_makes_a_joint_step_alone_learns_of_its_end_with_its_last_reply() -> None:
    """Another client's thread may run it, and this client's next message comes at once."""
    scene = Scene(tiny.split_bundle(), joint=True)
    assert scene.say(ANN, draw(0)) == []
    scene.awaited = {ANN}  # as Bob has shared
    deliveries = scene.run()
    assert tell(deliveries) == [("a", "h.grad loss done")]
    alone = Scene(tiny.split_bundle())
    (computed, _) = alone.submit(step_task(ANN, draw(0)))
    for name, array in deliveries[0].tensors.items():
        assert array.tobytes() == computed.tensors[name].tobytes()


def test_without_a_timeout_a_joint_step_waits_forever() -> None:
    scene = Scene(tiny.split_bundle(), joint=True, timeout=None)
    scene.say(ANN, draw(0))
    scene.now = 1e18
    assert tell(scene.run()) == []


def test_a_learning_rate_that_most_others_do_not_have_is_refused_and_the_others_train() -> None:
    scene = Scene(tiny.split_bundle(), joint=True)
    scene.awaited = {ANN, BOB, EVE}
    for session, rate in ((ANN, 0.2), (BOB, 0.1)):
        assert tell(scene.submit(step_task(session, draw(0), rate=rate))) == []
    told = dict(tell(scene.submit(step_task(EVE, draw(1), rate=0.1))))
    assert told == {
        "a": "RemoteProtocolError",
        "b": "h.grad loss done",
        "e": "h.grad loss done",
    }
    assert scene.steps.take_left_out() == {ANN}


def fail(model: ServerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise StageFailed("body.step", "no memory")

    monkeypatch.setattr(model, "run", run)


def test_a_joint_step_that_fails_is_repeated_by_its_clients_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(tiny.split_bundle(), joint=True)
    scene.say(ANN, draw(0))
    fail(scene.model, monkeypatch)
    assert sorted(scene.say(BOB, draw(1))) == [("a", "StepEnded"), ("b", "StepEnded")]
    assert scene.say(ANN, draw(0)) == [("a", "StageFailed")]
    monkeypatch.undo()
    assert scene.say(BOB, draw(1)) == [("b", "h.grad loss done")]
    assert scene.model.version == 1


@pytest.mark.parametrize("fails", [True, False], ids=["failure", "success"])
def test_what_a_caller_does_not_take_is_delivered_the_next_time(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A session stops at the error for its own client; the others must not wait forever."""
    scene = Scene(tiny.split_bundle(), joint=True)
    scene.say(ANN, draw(0))
    if fails:
        fail(scene.model, monkeypatch)
    scene.steps.add(step_task(BOB, draw(1)), 0.0)
    deliveries = scene.steps.run(scene.model, scene.awaited, 0.0)
    taken = tell([next(deliveries)])
    deliveries.close()  # type: ignore[attr-defined]
    told = "StepEnded" if fails else "h.grad loss done"
    assert sorted(taken + tell(scene.run())) == [("a", told), ("b", told)]
    assert tell(scene.run()) == []


def test_where_one_client_withdraws_the_others_repeat_the_step(u_shaped: Bundle) -> None:
    scene = Scene(u_shaped, joint=True)
    scene.say(ANN, first(0))
    scene.say(BOB, first(1))
    scene.steps.withdraw(scene.model, step_task(ANN, {}).key)
    assert tell(scene.run()) == [("b", "StepEnded")]
    assert scene.model.version == 0
    scene.say(ANN, first(0))
    assert sorted(scene.say(BOB, first(1))) == [("a", FORTH), ("b", FORTH)]


def test_a_client_that_begins_again_does_not_receive_the_end_of_what_it_had_begun(
    u_shaped: Bundle,
) -> None:
    scene = Scene(u_shaped, joint=True)
    scene.say(ANN, first(0))
    scene.say(BOB, first(1))
    for session in (ANN, BOB):
        scene.steps.withdraw(scene.model, step_task(session, {}).key)
    assert scene.say(BOB, first(1)) == []
    assert sorted(scene.say(ANN, first(0))) == [("a", FORTH), ("b", FORTH)]


def test_of_a_joint_step_only_those_that_are_silent_are_named(u_shaped: Bundle) -> None:
    scene = Scene(u_shaped, joint=True, timeout=10.0)
    scene.say(ANN, first(0))
    scene.say(BOB, first(1))
    scene.now = 5.0
    scene.say(BOB, second(), turn=1)
    assert scene.steps.end_if_silent(scene.model, 9.9) == ()
    assert scene.steps.end_if_silent(scene.model, 10.0) == (ANN,)
    assert sorted(tell(scene.run())) == [("a", "StepEnded"), ("b", "StepEnded")]


@pytest.mark.parametrize("joint", [False, True])
def test_where_the_model_is_lost_every_step_ends_and_its_client_is_told(
    u_shaped: Bundle, joint: bool
) -> None:
    scene = Scene(u_shaped, joint=joint)
    scene.say(ANN, first(0))
    scene.say(BOB, first(1))
    scene.say(EVE, first(2))
    scene.steps.interrupt(scene.model, WorkerLost("", "it was killed"))
    scene.model = make_model(u_shaped)
    assert sorted(tell(scene.run())) == [(name, "WorkerLost") for name in "abe"]
    with pytest.raises(StepEnded):
        scene.say(ANN, second(), turn=1)


def test_only_steps_with_a_layout_are_joint() -> None:
    manifest = tiny.split_bundle().parties[SERVER].manifest
    assert SharedSteps(layout=BatchLayout(manifest)).are_joint
    assert not SharedSteps().are_joint
