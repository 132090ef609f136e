"""Clients train copies of one model, and each copy adopts what was joined before it is used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from splitonnx.errors import BundleError, NotFinite, RemoteProtocolError
from splitonnx.messages import TaskKey
from splitonnx.names import SHARE
from splitonnx.runtime.server.policies.joining.rounds import RoundRules, Rounds
from splitonnx.runtime.server.policies.joint_training import JointTraining
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.policies.tasks import Task
from splitonnx.runtime.server.policies.terms import Terms
from splitonnx.runtime.storage.round_records import RoundRecord
from splitonnx.sharing import LEAVES, ROUND, SAMPLES, name_joined, name_own
from tests.support.registries import ANN, BOB
from tests.support.sharing import greet, share_task, sharing_bundle, source_of

WIRES = ({"h": np.ones((2, 4), np.float32)}, {"labels": np.zeros((2, 2), np.float32)})


class Scene:
    """Two clients of one policy, and the rounds that it records."""

    def __init__(self) -> None:
        bundle = sharing_bundle()
        self.recorded: list[RoundRecord] = []
        self.now = 0.0
        self.policy = JointTraining(
            PerClient(source_of(bundle)),
            Rounds(RoundRules(clients_min=2, timeout=5.0)),
            terms=Terms(policy="splitfed-v1", local_steps=1),
            manifest=bundle.parties["server"].manifest,
            record=self.recorded.append,
            clock=lambda: self.now,
        )
        for name in (ANN, BOB):
            self.policy.join(greet(bundle, name), name[0], resume=False)

    def train(self, session: str, step: int) -> None:
        for turn, tensors in enumerate(WIRES):
            key = TaskKey(session, "train", step, 0)
            task = Task(key=key, turn=turn, seed=0, learning_rate=0.1, tensors=tensors)
            list(self.policy.submit(task))

    def weights(self, session: str) -> np.ndarray:
        return self.policy.models[session].read(["W2"])["W2"]

    def open_rounds(self) -> None:
        assert list(self.policy.submit(share_task(ANN, 0, 1.0))) == []
        assert len(list(self.policy.submit(share_task(BOB, 0, 3.0)))) == 2


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_all_who_shared_receive_the_average_and_the_round(scene: Scene) -> None:
    list(scene.policy.submit(share_task(ANN, 0, 1.0)))
    deliveries = {d.key: d for d in scene.policy.submit(share_task(BOB, 0, 3.0))}
    assert set(deliveries) == {TaskKey(name, SHARE, 0, 0) for name in (ANN, BOB)}
    for delivery in deliveries.values():
        assert delivery.is_last
        assert int(delivery.tensors[ROUND]) == 0
        np.testing.assert_array_equal(delivery.tensors[name_joined("W1")], np.full((3, 4), 2.0))


def test_the_copies_of_all_who_shared_are_averaged_by_samples(scene: Scene) -> None:
    scene.open_rounds()
    scene.train(ANN, 0)
    trained, start = scene.weights(ANN), scene.weights(BOB)
    assert (trained != start).any()
    list(scene.policy.submit(share_task(ANN, 1, 1.0, samples=3)))
    scene.train(BOB, 0)
    scene.train(BOB, 1)
    other = scene.weights(BOB)
    list(scene.policy.submit(share_task(BOB, 2, 1.0, samples=1)))
    for name, step in ((ANN, 1), (BOB, 2)):
        scene.train(name, step)  # the copies adopt the average before they are used
    joint = scene.recorded[-1].tensors["W2"]
    np.testing.assert_allclose(joint, (3 * trained + other) / 4, rtol=1e-6)
    assert [scene.policy.models[name].version for name in (ANN, BOB)] == [2, 3]


def test_a_round_is_recorded_before_anybody_learns_of_it(scene: Scene) -> None:
    list(scene.policy.submit(share_task(ANN, 0, 1.0)))
    assert not scene.recorded
    next(iter(scene.policy.submit(share_task(BOB, 0, 3.0))))
    assert [joint.number for joint in scene.recorded] == [0]


def test_a_round_that_cannot_be_recorded_is_kept_in_memory(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(joint: RoundRecord) -> None:
        raise BundleError("rounds", "the disk is full")

    scene.policy._coordinator._record = refuse
    scene.open_rounds()
    assert "round 0 is kept in memory alone" in caplog.text


def test_a_time_that_is_over_closes_the_round(scene: Scene) -> None:
    scene.open_rounds()
    scene.train(ANN, 0)
    list(scene.policy.submit(share_task(ANN, 1, 5.0, samples=1)))
    assert list(scene.policy.tick(4.9)) == []
    (delivery,) = scene.policy.tick(5.0)
    assert (delivery.key.session, int(delivery.tensors[ROUND])) == (ANN, 1)
    assert scene.policy.report().closed == 1


def test_a_saved_copy_that_adopts_an_average_counts_as_unsaved(scene: Scene) -> None:
    scene.open_rounds()
    model = scene.policy.models[ANN]
    assert model.is_saved
    scene.train(BOB, 0)
    scene.policy.unload(ANN)  # it adopts first
    assert not model.is_saved


def test_withdrawing_a_share_takes_it_out_of_the_round(scene: Scene) -> None:
    list(scene.policy.submit(share_task(ANN, 0, 1.0)))
    scene.policy.withdraw(TaskKey(ANN, SHARE, 0, 0))
    assert list(scene.policy.submit(share_task(BOB, 0, 3.0))) == []
    assert scene.policy.report().waiting == 1


def test_rounds_do_not_wait_for_a_session_that_left(scene: Scene) -> None:
    scene.open_rounds()
    scene.train(ANN, 0)
    list(scene.policy.submit(share_task(ANN, 1, 5.0, samples=1)))
    scene.policy.finish(BOB)
    scene.policy.leave(BOB)
    assert [d.key.session for d in scene.policy.tick(0.1)] == [ANN]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({name_own("W1"): None}, "other tensors than the manifest declares"),
        ({"W2": np.zeros((4, 2), np.float32)}, "other tensors than the manifest declares"),
        ({SAMPLES: np.array(-1)}, "-1 samples"),
        ({SAMPLES: np.array(2**62)}, "4611686018427387904 samples"),
        ({LEAVES: np.array(2)}, "and 2 as a yes or no"),
    ],
)
def test_a_share_that_is_not_as_declared_is_refused(
    scene: Scene, changed: dict[str, np.ndarray | None], reason: str
) -> None:
    task = share_task(ANN, 0, 1.0)
    tensors = {n: a for n, a in {**task.tensors, **changed}.items() if a is not None}
    with pytest.raises(RemoteProtocolError, match=reason):
        list(scene.policy.submit(replace(task, tensors=tensors)))
    assert scene.policy.report().waiting == 0


def test_a_copy_with_nan_is_not_joined(scene: Scene) -> None:
    scene.policy.models[ANN].adopt({"W2": np.full((4, 2), np.nan, np.float32)})
    with pytest.raises(NotFinite, match="W2"):
        list(scene.policy.submit(share_task(ANN, 0, 1.0)))


def test_what_is_known_of_members_does_not_wait_for_a_round_that_is_written(
    scene: Scene,
) -> None:
    seen = []

    def look(joint: RoundRecord) -> None:
        seen.append((scene.policy.report().closed, scene.policy.report_members()[BOB]))

    scene.open_rounds()
    scene.train(BOB, 0)
    scene.policy._coordinator._record = look
    list(scene.policy.submit(share_task(ANN, 0, 1.0, samples=1)))
    list(scene.policy.submit(share_task(ANN, 1, 1.0, samples=1)))
    list(scene.policy.submit(share_task(BOB, 1, 1.0, samples=1)))
    ((closed, member),) = seen
    assert closed == 1
    assert (member.version, member.round, member.rounds_behind) == (1, 1, 0)
