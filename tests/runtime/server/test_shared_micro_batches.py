"""One model for all clients takes each one's step of several micro-batches whole."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from splitonnx.errors import StepEnded
from splitonnx.messages import TaskKey, Tensors
from splitonnx.names import ASYNCHRONOUS, SPLITFED_V2, SYNCHRONOUS
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.steps.shared_steps import SharedSteps
from splitonnx.runtime.server.policies.tasks import Task
from tests.support.one_model import ACTIVATION, GRADIENT, RATE, Member, Table, make_bundle
from tests.support.shared_models import make_model, tell

POLICIES = (SPLITFED_V2, ASYNCHRONOUS)
PARTS = 2

Arrays = Mapping[str, np.ndarray]


def list_messages(seed: int) -> list[tuple[str, int, int, Arrays]]:
    """Make the messages of a step of micro-batches: phase, number, turn and arrays."""
    random = np.random.default_rng(seed)
    messages: list[tuple[str, int, int, Arrays]] = []
    for number in range(PARTS):
        forward = {
            ACTIVATION: random.standard_normal((4, 7), np.float32),
            "splitonnx.weight": np.array(1 / PARTS, np.float32),
        }
        backward = {GRADIENT: random.standard_normal((4, 6), np.float32)}
        messages += [("accumulate", number, 0, forward), ("accumulate", number, 1, backward)]
    return [*messages, ("update", PARTS, 0, {"splitonnx.micro_batches": np.array(PARTS)})]


def say(member: Member, message: tuple[str, int, int, Arrays]) -> None:
    phase, number, turn, arrays = message
    envelope = Tensors(
        session=member.session,
        phase=phase,
        step=0,
        micro_batch=number,
        turn=turn,
        seed=0,
        learning_rate=RATE,
    )
    member._say(envelope, arrays)


def perform(executor: Executor, messages: list[tuple[str, int, int, Arrays]]) -> list[Arrays]:
    """Run a step on an executor alone; return what it would send."""
    sent: list[Arrays] = []
    step = executor.step
    for phase, number, turn, arrays in messages:
        key = TaskKey("s", phase, step, number)
        if turn == 0:
            executor.begin(key, data={}, seed=0, learning_rate=RATE)
        executor.deliver(key, arrays)
        sent += [{n: a.copy() for n, a in wires.items()} for wires in executor.advance(key)]
        if executor.is_finished(key):
            executor.finish(key)
    return sent


def make_expected(table: Table, seeds: list[int]) -> tuple[list[list[Arrays]], Arrays]:
    assert table.bundle.server is not None
    executor = Executor(table.bundle.server, Engine(threads=1))
    sent = [perform(executor, list_messages(seed)) for seed in seeds]
    return sent, executor.state()


def read_state(table: Table) -> Arrays:
    state: Arrays = table.registry.policy._model.executor.state()  # type: ignore[attr-defined]
    return state


def check_heard(member: Member, expected: list[Arrays]) -> None:
    assert member.error is None
    assert len(member.heard) == len(expected)
    for (_, heard), wires in zip(member.heard, expected, strict=True):
        assert heard.keys() == wires.keys()
        for name, array in wires.items():
            np.testing.assert_array_equal(heard[name], array)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("late", range(5))
def test_steps_are_taken_one_after_the_other_whole(policy: str, late: int) -> None:
    """The second begins when the first has sent some of its messages, and waits for the rest."""
    table = Table(policy)
    ann, bob = table.members
    first, second = list_messages(1), list_messages(2)
    for message in first[: late + 1]:
        say(ann, message)
    say(bob, second[0])
    assert (bob.heard == []) == (late < len(first) - 1)
    for message in first[late + 1 :]:
        say(ann, message)
    for message in second[1:]:
        say(bob, message)
    sent, state = make_expected(table, [1, 2])
    check_heard(ann, sent[0])
    check_heard(bob, sent[1])
    assert table.version == 2
    for name, array in state.items():
        np.testing.assert_array_equal(read_state(table)[name], array, err_msg=name)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("said", [1, 2, 3, 4])
def test_a_client_that_does_not_go_on_loses_its_step_to_those_that_wait(
    policy: str, said: int
) -> None:
    table = Table(policy)
    ann, bob = table.members
    first, second = list_messages(1), list_messages(2)
    for message in first[:said]:
        say(ann, message)
    say(bob, second[0])
    for member in (ann, bob):
        assert member.error is None
    table.tick(1e18)
    for message in second[1:]:
        say(bob, message)
    if ann.error is None:  # between two tasks there was nothing to tell it of
        say(ann, first[said])
    assert isinstance(ann.error, StepEnded)
    sent, state = make_expected(table, [2])
    check_heard(bob, sent[0])
    for name, array in state.items():
        np.testing.assert_array_equal(read_state(table)[name], array, err_msg=name)
    again = ann.again()
    for message in first:
        say(again, message)
    sent, state = make_expected(table, [2, 1])
    check_heard(again, sent[1])
    for name, array in state.items():
        np.testing.assert_array_equal(read_state(table)[name], array, err_msg=name)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_may_begin_again_with_other_micro_batches(policy: str) -> None:
    table = Table(policy)
    ann, bob = table.members
    for message in list_messages(1)[:3]:
        say(ann, message)
    say(bob, list_messages(2)[0])
    ann.heard.clear()
    say(ann, list_messages(3)[0])  # which loses the model to the one that waits
    for message in list_messages(2)[1:]:
        say(bob, message)
    for message in list_messages(3)[1:]:
        say(ann, message)
    sent, state = make_expected(table, [2, 3])
    check_heard(bob, sent[0])
    check_heard(ann, sent[1])
    for name, array in state.items():
        np.testing.assert_array_equal(read_state(table)[name], array, err_msg=name)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_micro_batch_that_is_wrong_ends_its_own_step_alone(policy: str) -> None:
    table = Table(policy)
    ann, bob = table.members
    first, second = list_messages(1), list_messages(2)
    for message in first[:3]:
        say(ann, message)
    say(bob, second[0])
    phase, number, turn, arrays = first[3]
    say(ann, (phase, number, turn, {name: array[:3] for name, array in arrays.items()}))
    assert ann.error is not None
    table.tick()
    for message in second[1:]:
        say(bob, message)
    sent, state = make_expected(table, [2])
    check_heard(bob, sent[0])
    for name, array in state.items():
        np.testing.assert_array_equal(read_state(table)[name], array, err_msg=name)


def test_a_joint_step_begins_when_all_have_sent_a_micro_batch() -> None:
    ann, bob = Table(SYNCHRONOUS).members[:2]
    say(ann, list_messages(1)[0])
    assert (ann.heard, ann.error) == ([], None)
    say(bob, list_messages(2)[0])
    assert (bob.error, ann.error) == (None, None)


def test_a_step_of_ever_more_micro_batches_does_not_hold_the_others_for_long() -> None:
    model, steps = make_model(make_bundle()), SharedSteps(timeout=10.0)

    def submit(session: str, number: int, turn: int, now: float) -> list[tuple[str, str]]:
        phase, _, _, arrays = list_messages(1)[turn]
        task = Task(
            key=TaskKey(session, phase, 0, number),
            turn=turn,
            seed=0,
            learning_rate=RATE,
            tensors=arrays,
        )
        steps.add(task, now)
        return tell(steps.run(model, (), now))

    for number in range(4):
        now = 5.0 * number
        submit("a", number, 0, now)
        assert submit("a", number, 1, now)[-1] == ("a", "done")
        assert steps.end_if_silent(model, now) == ()  # nobody waits
    assert submit("b", 0, 0, now) == []
    assert steps.end_if_silent(model, now) == ()  # nobody is silent, and the step has ended
    assert ("b", "act3@client") in tell(steps.run(model, (), now))
    with pytest.raises(StepEnded):
        submit("a", 4, 0, now)
