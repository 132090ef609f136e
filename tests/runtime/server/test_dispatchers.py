"""One connection's side at the server: what it answers, refuses, and how it ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import (
    BatchTooLarge,
    NotFinite,
    NotPermitted,
    RemoteProtocolError,
    ServerBusy,
    SplitonnxError,
    StageFailed,
    StageStopped,
    StaleConnection,
    TaskTooLarge,
    WorkerLost,
)
from splitonnx.messages import (
    Bye,
    Fault,
    Hello,
    Message,
    Save,
    Tensors,
    Unsaved,
    decode_message,
    encode_message,
)
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.edge.tokens import Role
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.estimates import Estimates
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.server.sessions import Session
from splitonnx.runtime.wire.protocols import Protocol, list_wires
from tests.support.callers import ACTIVATION, GRADIENT, SESSION, Caller, expect_fault, make_task
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


def test_good_bye_ends_a_connection_without_a_word(bundle: Bundle) -> None:
    caller = Caller(bundle)
    assert caller.say(Bye()) == []
    assert caller.dispatcher.is_closed


# --- roles, memory, and what a client is told -------------------------------------------------


def open_registry(bundle: Bundle) -> Registry:
    assert bundle.server is not None
    return Registry(Executor(bundle.server, Engine(threads=1)))


def say(dispatcher: Dispatcher, message: Message, **tensors: np.ndarray) -> list[Message]:
    content = b"".join(encode_message(message, tensors))
    return [decode_message(b"".join(reply))[0] for reply in dispatcher.handle(content)]


def hello(bundle: Bundle) -> Hello:
    manifest = bundle.client.manifest
    return Hello(
        digest=manifest.digest,
        session=SESSION,
        generation=1,
        step=0,
        wires=list_wires(manifest),
    )


def test_without_the_role_train_no_session_opens(bundle: Bundle) -> None:
    dispatcher = Dispatcher(open_registry(bundle), roles=frozenset({Role.OPERATE}))
    (fault,) = say(dispatcher, hello(bundle))
    assert isinstance(fault, Fault)
    assert (fault.code, fault.subject) == ("NotPermitted", "train")
    assert (dispatcher.session, dispatcher.is_closed) == (None, True)


def test_without_the_role_publish_a_checkpoint_is_kept_and_the_client_told(
    bundle: Bundle, tmp_path: Path
) -> None:
    bundle.save(tmp_path / "bundle")
    party = PartyBundle.load(tmp_path / "bundle" / "server")
    registry = Registry(Executor(party, Engine(threads=1)))
    dispatcher = Dispatcher(registry, roles=frozenset({Role.TRAIN}))
    say(dispatcher, hello(bundle))
    (answer,) = say(dispatcher, Save(session=SESSION, step=0, publish=True))
    assert isinstance(answer, Unsaved)
    assert "publish" in answer.reason
    assert (tmp_path / "bundle" / "server" / "sessions" / SESSION).is_dir()
    assert not (tmp_path / "bundle" / "server" / "state.safetensors").exists()


def test_a_task_over_the_memory_of_all_is_refused_with_the_figures(bundle: Bundle) -> None:
    assert bundle.server is not None
    estimates = Estimates(bundle.server.manifest, bundle.server.graphs)
    needed = estimates.measure("train", {"N": 2})
    for limit, is_refused in ((needed, False), (needed - 1, True)):
        dispatcher = Dispatcher(open_registry(bundle), estimates=estimates, task_bytes=limit)
        say(dispatcher, hello(bundle))
        (reply,) = say(dispatcher, make_task(), **ACTIVATION)
        assert isinstance(reply, Fault) is is_refused
        if isinstance(reply, Fault):
            assert (reply.code, reply.needed, reply.limit) == ("TaskTooLarge", needed, limit)


def test_what_a_message_s_task_takes_is_known_before_it_is_acted_on(bundle: Bundle) -> None:
    assert bundle.server is not None
    estimates = Estimates(bundle.server.manifest, bundle.server.graphs)
    dispatcher = Dispatcher(open_registry(bundle), estimates=estimates)
    assert dispatcher.read(b"".join(encode_message(hello(bundle)))).needed == 0
    say(Dispatcher(open_registry(bundle)), hello(bundle))
    greeted = Dispatcher(open_registry(bundle), estimates=estimates)
    say(greeted, hello(bundle))
    received = greeted.read(b"".join(encode_message(make_task(), ACTIVATION)))
    assert received.needed == estimates.measure("train", {"N": 2})
    assert greeted.session is not None
    assert not greeted.session.open_phases


def test_what_a_client_cannot_have_meant_ends_the_connection_with_a_fault(bundle: Bundle) -> None:
    caller = Caller(bundle)
    (fault,) = [
        decode_message(b"".join(reply))[0] for reply in caller.dispatcher.handle(b"no message")
    ]
    assert isinstance(fault, Fault)
    assert fault.code == "RemoteProtocolError"
    assert caller.dispatcher.is_closed


@pytest.mark.parametrize(
    ("error", "is_interrupted"),
    [
        (StageStopped("body.step"), True),
        (WorkerLost(SESSION, "it was ended"), True),
        (WorkerLost(SESSION, "it was ended", is_repeated=True), False),
        (StageFailed("body.step", "no memory"), False),
        (NotFinite("loss", "step 1"), False),
    ],
)
def test_what_says_nothing_against_the_session_is_not_told(
    bundle: Bundle, error: SplitonnxError, is_interrupted: bool
) -> None:
    """The client comes back to it, and finds the step as it was."""
    caller = Caller(bundle)
    caller.say(make_task(), ACTIVATION)
    assert caller.dispatcher.is_mid_step
    replies = list(caller.dispatcher.refuse(error))
    assert bool(replies) is not is_interrupted
    assert caller.dispatcher.is_interrupted is is_interrupted
    assert caller.dispatcher.is_closed
    assert not caller.dispatcher.is_mid_step
    assert caller.step == 0


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (ServerBusy("4 clients"), {"reason": "4 clients"}),
        (NotFinite("h", "step 3"), {"subject": "h", "reason": "step 3"}),
        (BatchTooLarge("h", 9, 8), {"subject": "h", "needed": 9, "limit": 8}),
        (TaskTooLarge(9, 8), {"needed": 9, "limit": 8}),
        (StaleConnection(1, 7), {"newest": 7}),
        (NotPermitted("train", "open a session"), {"subject": "train"}),
        (StageFailed("body.step", "no memory"), {"subject": ""}),
    ],
)
def test_an_error_is_told_with_the_facts_that_make_it_again(
    bundle: Bundle, error: SplitonnxError, facts: dict[str, object]
) -> None:
    dispatcher = Dispatcher(open_registry(bundle))
    (reply,) = dispatcher.refuse(error)
    fault, _ = decode_message(b"".join(reply))
    assert isinstance(fault, Fault)
    assert fault.code == type(error).__name__
    assert {name: getattr(fault, name) for name in facts} == facts


@pytest.mark.parametrize("step", ["receive", "seek", "greet"])
def test_a_mistake_of_ours_is_told_without_what_it_says_and_logged(
    step: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise AttributeError("/home/server/secret")

    places = {"receive": Protocol, "seek": Registry, "greet": Session}
    monkeypatch.setattr(places[step], step, fail)
    dispatcher = Dispatcher(open_registry(bundle))
    (fault,) = say(dispatcher, hello(bundle))
    assert isinstance(fault, Fault)
    assert fault.code == "InternalRuntimeError"
    assert "a mistake in splitonnx, at the server" in fault.reason
    assert "secret" not in fault.reason
    assert dispatcher.is_closed
    assert "AttributeError: /home/server/secret" in caplog.text


def test_an_older_connection_gives_nothing_up_when_it_ends(bundle: Bundle) -> None:
    registry = open_registry(bundle)
    old = Caller(bundle, registry)
    new = Caller(bundle, registry, generation=2)
    new.say(make_task(), ACTIVATION)
    list(old.dispatcher.refuse(RemoteProtocolError("nonsense")))
    old.dispatcher.end()
    assert new.dispatcher.is_mid_step
    new.say(make_task(turn=1), GRADIENT)
    assert new.step == 1
