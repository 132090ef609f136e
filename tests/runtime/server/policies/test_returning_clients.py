"""Server and client fail together: all go back to the round before, and no bit is lost."""

from __future__ import annotations

from collections.abc import Sequence

from splitonnx.messages import Save
from splitonnx.names import SPLITFED_V2, SYNCHRONOUS
from tests.support.registries import ANN, BOB
from tests.support.shared_models import tell
from tests.support.shared_scenes import EVE, JOINED, Scene


def restarted(
    name: str = SYNCHRONOUS, rounds: int = 2, savers: Sequence[str] = (ANN, BOB)
) -> Scene:
    """Return a server that failed after some rounds and runs again."""
    scene = Scene(name)
    scene.begin(ANN, BOB)
    for step in range(rounds):
        scene.make_round(step)
        for session in savers:
            scene.policy.save(Save(session=session, step=step + 1))
    scene.restart()
    return scene


def come_back(scene: Scene, session: str, *kept: int) -> int:
    """Greet the server with checkpoints of some steps, the last of them the client's own."""
    return scene.join(session, session[0], generation=2, step=kept[-1], kept=kept).step


def test_all_repeat_the_round_that_a_client_has_lost_with_the_server() -> None:
    calm, rough = Scene(SYNCHRONOUS), restarted()
    calm.begin(ANN, BOB)
    ends = [calm.make_round(step) for step in (0, 1, 2)]
    assert come_back(rough, BOB, 1, 2) == 2
    assert rough.train(BOB, 2) == []  # waits for Ann
    assert come_back(rough, ANN, 0, 1) == 1
    assert tell(rough.tick()) == [("b", "WorkerLost")]
    assert rough.policy.is_lost(BOB)
    assert come_back(rough, BOB, 1, 2) == 1
    again = [rough.make_round(step) for step in (1, 2)]
    for one, other in zip(ends[1:], again, strict=True):
        assert [(d.key, d.version, d.tensors[JOINED].tobytes()) for d in one] == [
            (d.key, d.version, d.tensors[JOINED].tobytes()) for d in other
        ]
    assert rough.state() == calm.state()
    assert [joint.number for joint in rough.recorded] == [0, 1, 2, 2, 3]


def test_all_go_back_if_a_client_fails_after_it_had_returned_to_the_new_server() -> None:
    rough = restarted()
    for session in (ANN, BOB):
        assert come_back(rough, session, 1, 2) == 2
    rough.policy.rewind(ANN, 1)  # it came again, without a checkpoint of step 2
    assert not rough.policy.is_lost(ANN)
    assert rough.policy.is_lost(BOB)
    assert come_back(rough, BOB, 1, 2) == 1
    rough.make_round(1)
    calm = Scene(SYNCHRONOUS)
    calm.begin(ANN, BOB)
    for step in (0, 1):
        calm.make_round(step)
    assert rough.state() == calm.state()


def test_a_share_that_waits_is_discarded_as_all_go_back() -> None:
    scene = restarted()
    come_back(scene, BOB, 1, 2)
    assert scene.share(BOB, 3, 9.0, samples=1) == []
    come_back(scene, ANN, 0, 1)
    assert tell(scene.tick()) == [("b", "WorkerLost")]
    assert scene.policy.report().waiting == 0


def test_nobody_goes_back_if_a_client_cannot() -> None:
    scene = restarted()
    assert come_back(scene, BOB, 2) == 2  # has deleted its earlier checkpoints
    assert come_back(scene, ANN, 0, 1) == 2
    assert not scene.policy.is_lost(BOB)
    assert scene.policy.list_steps(ANN) == (2, 1, 0)


def test_nobody_goes_back_if_one_that_has_not_come_yet_writes_no_checkpoints() -> None:
    scene = restarted(savers=[ANN])
    assert come_back(scene, ANN, 0, 1) == 2
    assert come_back(scene, BOB, 2) == 2


def test_all_go_back_with_one_that_has_not_come_yet_but_writes_checkpoints() -> None:
    scene = restarted()
    assert come_back(scene, ANN, 0, 1) == 1
    assert come_back(scene, BOB, 1, 2) == 1


def test_nobody_goes_back_once_a_joint_step_was_made_since_the_server_started() -> None:
    scene = restarted()
    for session in (ANN, BOB):
        come_back(scene, session, 1, 2)
        scene.train(session, 2)
    assert scene.join(ANN, "a", generation=3, step=1, kept=(0, 1)).step == 2
    assert not scene.policy.is_lost(BOB)


def test_nobody_goes_back_once_a_round_was_closed_since_the_server_started() -> None:
    scene = restarted()
    for session in (ANN, BOB):
        come_back(scene, session, 1, 2)
    scene.make_round(2)
    assert scene.join(ANN, "a", generation=3, step=2, kept=(1, 2)).step == 3
    assert not scene.policy.is_lost(BOB)


def test_nobody_goes_back_if_a_client_came_in_the_newest_round() -> None:
    scene = Scene(SYNCHRONOUS)
    scene.begin(ANN, BOB)
    scene.make_round(0)
    scene.join(EVE, "e")
    scene.share(EVE, 0, 0.0)
    for session in (ANN, BOB, EVE):
        scene.train(session, 0 if session == EVE else 1)
    for session in (ANN, BOB, EVE):
        scene.share(session, 1 if session == EVE else 2, 1.0, samples=1)
    scene.restart()
    assert come_back(scene, ANN, 0, 1) == 2


def test_a_client_cannot_have_the_others_go_back_twice() -> None:
    scene = restarted(rounds=3)
    assert come_back(scene, ANN, 1, 2) == 2
    assert come_back(scene, BOB, 2, 3) == 2
    assert come_back(scene, ANN, 0, 1) == 2
    assert not scene.policy.is_lost(BOB)


def test_steps_of_one_client_are_not_taken_back_from_others() -> None:
    scene = restarted(SPLITFED_V2)
    come_back(scene, BOB, 1, 2)
    assert come_back(scene, ANN, 0, 1) == 2
    assert not scene.policy.is_lost(BOB)
