"""Sessions whose steps wait for other clients: what is held, what is deferred, what is repeated."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import cast

import numpy as np
import pytest

from splitonnx.errors import RemoteProtocolError, SessionLost, StageFailed, StepEnded
from splitonnx.messages import Hello, Save, Saved, TaskKey, Tensors
from splitonnx.names import PREDICT, SHARE, TRAIN
from splitonnx.runtime.server.ledgers import Fingerprint, Reply
from splitonnx.runtime.server.policies.policies import Policy
from splitonnx.runtime.server.policies.tasks import Delivery, Joined, Task
from splitonnx.runtime.server.sessions import MOST_DEFERRED, Session
from tests.support.registries import ANN, BOB

GRADIENT = {"h.grad": np.ones((2, 4), np.float32)}
OTHERS = Delivery(key=TaskKey(BOB, TRAIN, 9, 0), version=0, is_last=True)


class Script:
    """A policy that delivers what the test says, and notes what it is asked for."""

    def __init__(self) -> None:
        self.following: list[list[Delivery]] = []
        self.tasks: list[TaskKey] = []
        self.withdrawn: list[TaskKey] = []
        self.rewound: list[int] = []
        self.saved: list[int] = []
        self.steps: tuple[int, ...] = ()

    def submit(self, task: Task) -> Generator[Delivery, None, None]:
        self.tasks.append(task.key)
        yield from self.following.pop(0) if self.following else []

    def withdraw(self, key: TaskKey) -> None:
        self.withdrawn.append(key)

    def list_steps(self, session: str) -> tuple[int, ...]:
        return self.steps

    def rewind(self, session: str, step: int) -> None:
        self.rewound.append(step)

    def save(self, request: Save) -> None:
        self.saved.append(request.step)


class Scene:
    """Ann's session, whose steps are made with others'."""

    def __init__(self, *, is_shared: bool = True, is_joint: bool = True, step: int = 0) -> None:
        self.script = Script()
        joined = Joined(owner="", step=step, is_shared=is_shared, is_joint=is_joint)
        self.session = Session(ANN, joined, cast("Policy", self.script))
        self.generation = 0

    def greet(self, step: int, *, is_open: bool = False, kept: tuple[int, ...] = ()) -> int:
        self.generation += 1
        hello = Hello(
            digest="",
            session=ANN,
            generation=self.generation,
            step=step,
            is_open=is_open,
            kept=kept,
            wires={},
        )
        return self.session.greet(hello).step

    def say(
        self, step: int, *, phase: str = TRAIN, turn: int = 0, content: str = ""
    ) -> list[str | Delivery]:
        message = Tensors(
            session=ANN,
            phase=phase,
            step=step,
            micro_batch=0,
            turn=turn,
            seed=0,
            learning_rate=0.1,
        )
        sent = Fingerprint(f"{phase} {step} {turn} {content}".encode())
        return read(self.session.handle_training(message, {}, sent, encode))

    def take(self, delivery: Delivery) -> list[str | Delivery]:
        return read(self.session.take(delivery, encode))


def encode(message: Tensors, tensors: Mapping[str, np.ndarray]) -> Reply:
    names = " ".join(sorted(tensors))
    return [f"{message.phase} {message.step} reply {message.turn}: {names}".encode()]


def read(replies: Iterable[Reply | Delivery]) -> list[str | Delivery]:
    """Return the replies as text, and what is for others as it is."""
    return [r if isinstance(r, Delivery) else b"".join(map(bytes, r)).decode() for r in replies]


def end(step: int = 0, phase: str = TRAIN) -> Delivery:
    """Return the end of Ann's task, with its last reply."""
    key = TaskKey(ANN, phase, step, 0)
    return Delivery(key=key, version=1, tensors=GRADIENT, is_last=True)


def fail(step: int = 0) -> Delivery:
    return Delivery(key=TaskKey(ANN, TRAIN, step, 0), version=1, error=StepEnded(step))


REPLY = "train 0 reply 0: h.grad"


# --- waiting ----------------------------------------------------------------------------------


def test_a_step_that_waits_for_others_waits_for_nothing_of_its_client() -> None:
    scene = Scene()
    assert not scene.session.awaits_others
    assert scene.say(0) == []
    assert scene.session.awaits_others
    assert scene.session.open_phases == {TRAIN}
    assert scene.take(end()) == [REPLY]
    assert not scene.session.awaits_others
    assert (scene.session.ledger.step, scene.session.tasks_done) == (1, 1)


def test_between_two_messages_of_a_step_its_client_is_waited_for() -> None:
    scene = Scene()
    scene.say(0)
    part = Delivery(key=end().key, version=0, tensors=GRADIENT)
    assert scene.take(part) == [REPLY]
    assert scene.session.awaits_others  # more may come without the client
    assert scene.take(Delivery(key=end().key, version=0, handled=1)) == []
    assert not scene.session.awaits_others
    scene.say(0, turn=1)
    assert scene.session.awaits_others
    assert scene.take(end()) == ["train 0 reply 1: h.grad"]


def test_a_session_with_a_model_of_its_own_waits_for_nobody() -> None:
    scene = Scene(is_shared=False, is_joint=False)
    scene.say(0)
    assert not scene.session.awaits_others


def test_what_others_wait_for_is_passed_on_by_whose_message_caused_it() -> None:
    scene = Scene()
    scene.script.following = [[OTHERS, end()]]
    assert scene.say(0) == [OTHERS, REPLY]
    assert scene.session.ledger.step == 1


def test_a_delivery_that_the_client_no_longer_waits_for_is_dropped() -> None:
    scene = Scene()
    assert scene.take(end()) == []
    scene.say(0)
    assert scene.take(end(step=7)) == []
    assert scene.take(end(phase=SHARE)) == []
    assert scene.session.ledger.step == 0


def test_the_error_that_ended_a_step_is_raised_and_the_step_can_begin_again() -> None:
    scene = Scene()
    scene.say(0)
    with pytest.raises(StepEnded):
        scene.take(fail())
    scene.session.abandon()
    scene.script.following = [[end()]]
    assert scene.say(0) == [REPLY]


def test_the_error_of_a_query_is_raised() -> None:
    scene = Scene()
    scene.say(0, phase=SHARE)
    failed = Delivery(key=end(phase=SHARE).key, version=1, error=StageFailed("x", "no memory"))
    with pytest.raises(StageFailed):
        scene.take(failed)


# --- holding ----------------------------------------------------------------------------------


def test_a_client_that_was_away_when_its_step_ended_receives_the_reply_when_it_asks() -> None:
    scene = Scene()
    scene.greet(0)
    scene.say(0)
    scene.session.hold(end())
    assert scene.greet(0, is_open=True) == 0
    assert scene.say(0) == [REPLY]
    assert scene.session.ledger.step == 1
    assert scene.script.tasks == [end().key]  # it was made once


def test_several_results_are_held_in_order() -> None:
    scene = Scene()
    scene.greet(0)
    scene.say(0)
    first = Delivery(key=end().key, version=0, tensors=GRADIENT)
    for delivery in (first, end()):
        scene.session.hold(delivery)
    scene.greet(0, is_open=True)
    assert scene.say(0) == [REPLY, "train 0 reply 1: h.grad"]


def test_a_held_error_is_raised_when_the_client_asks() -> None:
    scene = Scene()
    scene.greet(0)
    scene.say(0)
    scene.session.hold(fail())
    scene.greet(0, is_open=True)
    with pytest.raises(StepEnded):
        scene.say(0)


@pytest.mark.parametrize("phase", [SHARE, PREDICT])
def test_only_results_of_steps_are_held_because_the_rest_is_asked_for_again(phase: str) -> None:
    scene = Scene()
    scene.greet(0)
    scene.say(0, phase=phase)
    scene.session.hold(end(phase=phase))
    scene.greet(0)
    assert scene.say(0, phase=phase) == []
    assert len(scene.script.tasks) == 2


def test_what_is_held_for_a_step_that_was_given_up_is_dropped() -> None:
    scene = Scene()
    scene.greet(0)
    scene.say(0)
    scene.session.hold(end())
    scene.session.abandon()
    assert scene.script.withdrawn == [end().key]
    assert scene.say(0) == []
    assert scene.session.ledger.step == 0


# --- deferring ----------------------------------------------------------------------------------


def test_a_message_that_comes_before_the_step_has_ended_is_handled_when_it_has() -> None:
    scene = Scene()
    scene.say(0)
    assert scene.say(1) == []
    assert scene.script.tasks == [TaskKey(ANN, TRAIN, 0, 0)]
    scene.script.following = [[OTHERS, end(1)]]
    assert scene.take(end()) == [REPLY, OTHERS, "train 1 reply 0: h.grad"]
    assert scene.session.ledger.step == 2


def test_a_share_may_come_before_the_step_has_ended_too() -> None:
    scene = Scene()
    scene.say(0)
    assert scene.say(1, phase=SHARE) == []
    assert scene.take(end()) == [REPLY]
    assert scene.script.tasks[-1] == TaskKey(ANN, SHARE, 1, 0)


def test_a_client_that_sends_a_whole_step_again_at_once_may_share_after_it() -> None:
    """Another client's thread runs the first message, whose reply comes before the second's."""
    scene = Scene(is_joint=False)
    scene.say(0)
    assert scene.say(0, turn=1) == scene.say(1, phase=SHARE) == []
    assert scene.take(Delivery(key=end().key, version=0, tensors=GRADIENT)) == [REPLY]
    scene.script.following = [[end()]]  # else its reply would come before that one
    last = scene.take(Delivery(key=end().key, version=0, handled=1))
    assert last == ["train 0 reply 1: h.grad"]
    assert scene.script.tasks[-1] == TaskKey(ANN, SHARE, 1, 0)


def test_only_some_messages_are_deferred() -> None:
    scene = Scene()
    scene.say(0)
    for step in range(1, 1 + MOST_DEFERRED):
        scene.say(step)
    with pytest.raises(RemoteProtocolError, match="it goes on before its step has ended"):
        scene.say(1 + MOST_DEFERRED)


@pytest.mark.parametrize("how", ["greeting", "error", "abandonment"])
def test_a_deferred_message_is_forgotten_with_its_connection_or_its_step(how: str) -> None:
    scene = Scene()
    scene.greet(0)
    scene.say(0)
    scene.say(1)
    if how == "greeting":
        scene.greet(0, is_open=True)
    elif how == "error":
        with pytest.raises(StepEnded):
            scene.take(fail())
        scene.session.abandon()
    else:
        scene.session.abandon()
    scene.take(end())
    assert scene.script.tasks == [end().key]


# --- joint steps that a client has lost ---------------------------------------------------------


def after_a_step(*, is_joint: bool) -> Scene:
    """Return a session that has made step 0, and could go back to its beginning."""
    scene = Scene(is_joint=is_joint)
    scene.greet(0)
    scene.script.following = [[end()]]
    scene.say(0)
    scene.script.steps = (0,)
    return scene


def test_a_client_that_lost_a_joint_step_receives_its_replies_again() -> None:
    scene = after_a_step(is_joint=True)
    assert scene.greet(0, kept=(0,)) == 0
    assert scene.script.rewound == []
    assert scene.say(0) == [REPLY]
    assert scene.script.tasks == [end().key]  # the others have made it, too
    scene.script.following = [[end(1)]]
    assert scene.say(1) == ["train 1 reply 0: h.grad"]


def test_a_client_that_lost_a_step_of_its_own_makes_it_again() -> None:
    scene = after_a_step(is_joint=False)
    assert scene.greet(0, kept=(0,)) == 0
    assert scene.script.rewound == [0]
    scene.say(0)
    assert len(scene.script.tasks) == 2


def test_a_client_that_lost_two_joint_steps_goes_back_to_where_both_sides_can() -> None:
    scene = after_a_step(is_joint=True)
    scene.script.following = [[end(1)]]
    scene.say(1)
    assert scene.greet(0, kept=(0,)) == 0
    assert scene.script.rewound == [0]
    scene = after_a_step(is_joint=True)
    scene.script.steps = ()
    scene.script.following = [[end(1)]]
    scene.say(1)
    with pytest.raises(SessionLost):
        scene.greet(0, kept=(0,))


@pytest.mark.parametrize("is_joint", [True, False])
def test_before_it_repeats_a_joint_step_a_client_may_save_and_share(is_joint: bool) -> None:
    scene = after_a_step(is_joint=is_joint)
    save = Save(session=ANN, step=0)
    if not is_joint:
        with pytest.raises(RemoteProtocolError, match="save step 0, the server is at 1"):
            scene.session.save(save)
        with pytest.raises(RemoteProtocolError, match="shares at step 0, the server is at 1"):
            scene.say(0, phase=SHARE)
        return
    scene.greet(0, kept=(0,))
    assert scene.session.save(save) == Saved(session=ANN, step=0)
    assert scene.script.saved == [0]
    assert scene.say(0, phase=SHARE) == []
    assert scene.take(end(0, SHARE)) == ["share 0 reply 0: h.grad"]
    assert scene.say(0) == [REPLY]


@pytest.mark.parametrize("step", [0, 1])
def test_in_the_middle_of_a_joint_step_nothing_is_saved(step: int) -> None:
    scene = Scene()
    scene.say(0)
    with pytest.raises(RemoteProtocolError):
        scene.session.save(Save(session=ANN, step=step))
    assert scene.script.saved == []


def test_what_answers_an_earlier_connection_s_message_is_sent_when_the_client_repeats_it() -> None:
    scene = Scene()
    scene.greet(0)
    key = TaskKey(ANN, TRAIN, 0, 0)
    scene.say(0)
    scene.take(Delivery(key=key, version=0, tensors=GRADIENT, turn=0, handled=1))
    scene.say(0, turn=1)
    scene.greet(0)  # the client was killed, and begins the step anew
    assert scene.say(0) == ["train 0 reply 0: h.grad"]
    last = Delivery(key=key, version=1, tensors=GRADIENT, turn=1, is_last=True, handled=2)
    assert scene.take(last) == []  # it has not sent the second message again
    assert scene.say(0, turn=1) == ["train 0 reply 1: h.grad"]
    assert scene.session.ledger.step == 1
