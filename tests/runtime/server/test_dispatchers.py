"""One connection's side at the server: what it answers, refuses, and how it ends."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import ServerBusy
from splitonnx.messages import Bye, Fault, Tensors
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.registries import Registry
from tests.support.callers import ACTIVATION, GRADIENT, Caller, expect_fault, make_task
from tests.support.zoo import ZOO


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (make_task("f" * 32), "session"),
        (make_task(step=1), "step 1"),
        (make_task(turn=1), "message 1 of step 0"),
    ],
)
def test_a_task_of_another_session_step_or_turn_is_refused(
    bundle: Bundle, task: Tensors, reason: str
) -> None:
    caller = Caller(bundle)
    expect_fault(caller.say(task, ACTIVATION), "RemoteProtocolError", reason)
    assert caller.dispatcher.is_closed
    assert caller.step == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_before_the_step(
    bundle: Bundle, value: float
) -> None:
    caller = Caller(bundle)
    wrong = np.ones((2, 7), np.float32)
    wrong[1, 3] = value
    (fault,) = caller.say(make_task(), {"act1@server": wrong})
    assert isinstance(fault, Fault)
    assert (fault.code, fault.subject, fault.reason) == ("NotFinite", "act1@server", "step 1")
    assert caller.step == 0


def test_a_gradient_over_the_norm_limit_is_refused_before_the_step(bundle: Bundle) -> None:
    caller = Caller(bundle, norm=3.5)
    caller.say(make_task(), {"act1@server": np.full((2, 7), 100, np.float32)})
    assert len(caller.say(make_task(turn=1), GRADIENT)) == 1  # its norm is the root of 12
    caller.say(make_task(step=1), ACTIVATION)
    large = {"act3@client_grad": np.full((2, 6), 2, np.float32)}
    expect_fault(caller.say(make_task(step=1, turn=1), large), "NormTooLarge", "limit of 3.5")
    assert caller.step == 1


def test_an_older_connection_of_a_session_can_do_nothing(bundle: Bundle) -> None:
    assert bundle.server is not None
    registry = Registry(Executor(bundle.server, Engine(threads=1)))
    old = Caller(bundle, registry)
    new = Caller(bundle, registry, generation=2)
    expect_fault(old.say(make_task(), ACTIVATION), "StaleConnection", "replaced by connection 2")
    late = Caller(bundle, registry, generation=2)
    assert isinstance(late.greeting, Fault)
    assert (late.greeting.code, late.greeting.newest) == ("StaleConnection", 2)
    (reply,) = new.say(make_task(), ACTIVATION)
    assert isinstance(reply, Tensors)


def test_a_session_for_which_there_is_no_room_just_now_is_interrupted_and_not_refused(
    bundle: Bundle,
) -> None:
    """Told so, its client would end its training."""
    dispatcher = Caller(bundle).dispatcher
    assert [*dispatcher.refuse(ServerBusy("memory"))] == []
    assert dispatcher.is_interrupted
    assert dispatcher.is_closed


def test_good_bye_ends_a_conversation_without_a_word(bundle: Bundle) -> None:
    caller = Caller(bundle)
    assert caller.say(Bye()) == []
    assert caller.dispatcher.is_closed
