"""The coordinator checks shares, records a round before anybody learns of it, and words answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from splitonnx.errors import BundleError, NotSaved, RemoteProtocolError, SplitonnxError, WorkerLost
from splitonnx.names import SERVER
from splitonnx.runtime.server.policies.joining.coordinators import MOST_SAMPLES, Coordinator
from splitonnx.runtime.server.policies.joining.rounds import Answer, RoundRules, Rounds
from splitonnx.runtime.storage.round_records import RoundRecord
from splitonnx.sharing import LEAVES, ROUND, SAMPLES, name_joined, name_own
from tests.support.registries import ANN, BOB
from tests.support.sharing import share_task, sharing_bundle

MANIFEST = sharing_bundle().parties[SERVER].manifest


class Scene:
    """A coordinator of two clients, and in order what it does."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.recorded: list[RoundRecord] = []
        self.refusal: SplitonnxError | None = None
        self.hindrance: SplitonnxError | None = None
        self.now = 0.0
        self.coordinator = Coordinator(
            Rounds(RoundRules(clients_min=2, timeout=5.0)),
            manifest=MANIFEST,
            record=self.record,
            complete=self.complete,
            answered=lambda answer: self.done.append(f"answered {answer.key.session[0]}"),
            clock=lambda: self.now,
        )

    def complete(self, joint: RoundRecord, answers: Sequence[Answer]) -> RoundRecord:
        self.done.append(f"completed {joint.number} of {len(answers)}")
        if self.hindrance is not None:
            raise self.hindrance
        return replace(joint, version=70 + joint.number)

    def record(self, joint: RoundRecord) -> None:
        self.done.append("recorded")
        if self.refusal is not None:
            raise self.refusal
        self.recorded.append(joint)

    def share(self, session: str, step: int, value: float, *, samples: int = 0) -> list[Answer]:
        task = share_task(session, step, value, samples=samples)
        return self.coordinator.add(self.coordinator.read(task))


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_closed_round_is_completed_and_recorded_before_anybody_is_answered(scene: Scene) -> None:
    assert scene.share(ANN, 0, 1.0) == []
    assert scene.done == []
    assert len(scene.share(BOB, 0, 3.0)) == 2
    assert scene.done == ["completed 0 of 2", "recorded", "answered a", "answered b"]
    assert [record.version for record in scene.recorded] == [70]


def test_an_answer_without_a_new_round_is_not_recorded_again(scene: Scene) -> None:
    scene.share(ANN, 0, 1.0)
    scene.share(BOB, 0, 3.0)
    scene.done.clear()
    assert len(scene.share(ANN, 0, 9.0)) == 1  # its answer was lost
    assert scene.done == ["answered a"]


def test_a_share_has_what_the_client_sent_and_no_counts_among_it(scene: Scene) -> None:
    share = scene.coordinator.read(share_task(ANN, 4, 2.0, samples=9, leaves=1))
    assert (share.samples, share.leaves, share.key.step) == (9, True, 4)
    assert list(share.tensors) == [name_own("W1")]
    most = scene.coordinator.read(share_task(ANN, 4, 2.0, samples=MOST_SAMPLES))
    assert most.samples == int(float(MOST_SAMPLES))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({name_own("W1"): None}, "other tensors than the manifest declares"),
        ({"W2": np.zeros((4, 2), np.float32)}, "other tensors than the manifest declares"),
        ({SAMPLES: np.array(-1)}, "it shares -1 samples"),
        ({SAMPLES: np.array(MOST_SAMPLES + 1)}, f"it shares {MOST_SAMPLES + 1} samples"),
        ({LEAVES: np.array(-1)}, "and -1 as a yes or no"),
    ],
)
def test_what_the_manifest_does_not_declare_is_refused(
    scene: Scene, changed: dict[str, np.ndarray | None], reason: str
) -> None:
    task = share_task(ANN, 0, 1.0)
    tensors = {n: a for n, a in {**task.tensors, **changed}.items() if a is not None}
    with pytest.raises(RemoteProtocolError, match=reason):
        scene.coordinator.read(replace(task, tensors=tensors))


def test_a_share_is_one_message(scene: Scene) -> None:
    with pytest.raises(RemoteProtocolError, match="other tensors"):
        scene.coordinator.read(replace(share_task(ANN, 0, 1.0), turn=1))


def test_a_delivery_has_the_joined_tensors_by_their_own_names_and_the_round(scene: Scene) -> None:
    scene.share(ANN, 0, 1.0)
    (answer, _) = scene.share(BOB, 0, 3.0)
    delivery = scene.coordinator.deliver(answer, 17)
    assert (delivery.key, delivery.version, delivery.is_last) == (answer.key, 17, True)
    assert set(delivery.tensors) == {name_joined("W1"), ROUND}
    np.testing.assert_array_equal(delivery.tensors[name_joined("W1")], np.full((3, 4), 2.0))
    assert int(delivery.tensors[ROUND]) == 0


@pytest.mark.parametrize("error", [BundleError("rounds", "the disk is full"), NotSaved("it", "no")])
def test_a_round_that_cannot_be_written_is_answered_and_the_log_says_so(
    scene: Scene, caplog: pytest.LogCaptureFixture, error: SplitonnxError
) -> None:
    scene.refusal = error
    scene.share(ANN, 0, 1.0)
    with caplog.at_level(logging.ERROR):
        assert len(scene.share(BOB, 0, 3.0)) == 2
    assert "round 0 is kept in memory alone" in caplog.text
    assert scene.coordinator.newest is not None


def test_a_round_is_closed_by_the_clock_and_by_a_member_that_is_waited_for_no_longer(
    scene: Scene,
) -> None:
    for session in (ANN, BOB):
        scene.share(session, 0, 1.0)
    scene.now = 10.0
    assert scene.share(ANN, 1, 1.0, samples=1) == []
    assert scene.coordinator.list_awaited() == {BOB}
    assert scene.coordinator.close_if_due(14.9) == []
    assert [a.key.session for a in scene.coordinator.close_if_due(15.0)] == [ANN]
    scene.share(BOB, 0, 0.0)
    assert scene.share(ANN, 2, 1.0, samples=1) == []
    scene.coordinator.stop_waiting(BOB)
    assert [a.key.session for a in scene.coordinator.close_if_due(16.0)] == [ANN]


def test_a_session_is_known_by_the_steps_at_which_it_received_tensors_until_it_ended(
    scene: Scene,
) -> None:
    for session in (ANN, BOB):
        scene.share(session, 0, 1.0)
    for session in (ANN, BOB):
        scene.share(session, 3, 1.0, samples=1)
    assert scene.coordinator.list_adopted(ANN) == (3, 0)
    assert scene.coordinator.report_member(ANN, 6).version == 6
    assert scene.coordinator.report_member(ANN, 6).round == 1
    scene.coordinator.rewind(ANN, 2)
    assert scene.coordinator.list_adopted(ANN) == (0,)
    scene.coordinator.forget(BOB)
    assert scene.coordinator.list_adopted(BOB) == ()
    assert scene.coordinator.report().members == 1


def test_a_share_that_is_withdrawn_waits_no_longer(scene: Scene) -> None:
    scene.share(ANN, 0, 1.0)
    scene.coordinator.withdraw(ANN)
    assert scene.share(BOB, 0, 3.0) == []
    assert scene.coordinator.report().waiting == 1


def test_a_round_that_cannot_be_completed_stays_open_with_the_shares_before(scene: Scene) -> None:
    scene.share(ANN, 0, 1.0)
    scene.hindrance = WorkerLost("", "it was killed")
    with pytest.raises(WorkerLost):
        scene.share(BOB, 0, 3.0)
    assert scene.recorded == []
    assert scene.coordinator.newest is None
    assert scene.coordinator.report().waiting == 1
    scene.hindrance = None
    assert len(scene.share(BOB, 0, 3.0)) == 2


def test_of_all_sessions_is_known_when_they_received_which_round(scene: Scene) -> None:
    for step in (0, 3):
        for session in (ANN, BOB):
            scene.share(session, step, 1.0, samples=step)
    assert scene.coordinator.list_adoptions() == dict.fromkeys((ANN, BOB), ((3, 1), (0, 0)))


def test_all_shares_can_be_withdrawn(scene: Scene) -> None:
    scene.share(ANN, 0, 1.0)
    assert [key.session for key in scene.coordinator.withdraw_all()] == [ANN]
    assert scene.share(BOB, 0, 3.0) == []
