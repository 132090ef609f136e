"""What others' messages cause reaches a client on its connection, or waits for its next one."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import NotFinite, SplitonnxError, StageFailed, StepEnded, WorkerLost
from splitonnx.messages import Fault, Hello, TaskKey, Tensors, decode_message, encode_message
from splitonnx.names import CLIENT, SPLITFED_V2, SYNCHRONOUS, TRAIN
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.policies.tasks import Delivery
from splitonnx.runtime.server.sessions import Session
from splitonnx.runtime.wire.protocols import list_wires
from tests.support.sharers import Sharer, Table
from tests.support.sharing import sharing_bundle

ANN, BOB = "a" * 32, "b" * 32


def sit_down(policy: str) -> tuple[Table, Sharer, Sharer]:
    """Have two clients greet, and receive what they start from."""
    table = Table(policy=policy)
    ann, bob = Sharer(table, ANN), Sharer(table, BOB)
    for sharer in (ann, bob):
        sharer.share(0, samples=0)
    ann.heard.clear()
    return table, ann, bob


def session_of(sharer: Sharer) -> Session:
    assert sharer.dispatcher.session is not None
    return sharer.dispatcher.session


def hello(generation: int) -> Hello:
    manifest = sharing_bundle().parties[CLIENT].manifest
    return Hello(
        digest=manifest.digest,
        session=ANN,
        generation=generation,
        step=0,
        is_open=True,
        can_share=True,
        wires=list_wires(manifest),
    )


def make_end(**changes: object) -> Delivery:
    """Return the end of Ann's first step."""
    facts = {"key": TaskKey(ANN, TRAIN, 0, 0), "version": 1, **changes}
    return Delivery(**facts)  # type: ignore[arg-type]


FIRST = Tensors(session=ANN, phase=TRAIN, step=0, micro_batch=0, turn=0, seed=0, learning_rate=0.1)
GRADIENT = {"h.grad": np.ones((2, 4), np.float32), "loss": np.array(0.5, np.float32)}


def test_the_last_client_of_a_joint_step_causes_the_replies_to_all() -> None:
    _, ann, bob = sit_down(SYNCHRONOUS)
    assert ann.train(0) == []
    assert not ann.dispatcher.is_mid_step  # a server that stops need not wait for Ann's message
    ((reply, tensors),) = bob.train(0)
    assert isinstance(reply, Tensors)
    (heard,) = ann.heard
    assert set(heard) == set(tensors) == {"h.grad", "loss"}
    np.testing.assert_array_equal(heard["h.grad"], tensors["h.grad"])  # they sent the same rows
    assert [session_of(sharer).ledger.step for sharer in (ann, bob)] == [1, 1]


def test_one_model_one_by_one_answers_each_on_its_own_connection() -> None:
    _, ann, bob = sit_down(SPLITFED_V2)
    ann.begin(0)
    assert bob.train(0) == []  # Ann's step has begun
    ((message, _),) = ann.say(
        Tensors(session=ANN, phase=TRAIN, step=0, micro_batch=0, turn=1, seed=0, learning_rate=0.1),
        {"labels": np.zeros((2, 2), np.float32)},
    )
    assert isinstance(message, Tensors)
    assert [set(tensors) for tensors in bob.heard] == [{"h.grad", "loss"}]
    assert session_of(bob).ledger.step == 1


@pytest.mark.parametrize(
    "error", [StepEnded(0), WorkerLost(ANN, "it was killed"), StageFailed("x", "no memory"),
              NotFinite("loss", "step 0")]
)  # fmt: skip
def test_an_error_in_a_delivery_refuses_the_connection_or_interrupts_it(
    error: SplitonnxError,
) -> None:
    _, ann, _ = sit_down(SYNCHRONOUS)
    ann.train(0)
    replies = [decode_message(b"".join(r))[0] for r in ann.dispatcher.take(make_end(error=error))]
    is_interrupted = isinstance(error, StepEnded | WorkerLost)
    assert ann.dispatcher.is_interrupted is is_interrupted
    assert [isinstance(reply, Fault) for reply in replies] == ([] if is_interrupted else [True])
    assert ann.dispatcher.refused is error
    assert ann.dispatcher.is_closed
    assert not session_of(ann).ledger.is_open
    assert session_of(ann).ledger.step == 0


def test_a_connection_that_was_refused_leaves_what_comes_to_the_next_one() -> None:
    table, ann, bob = sit_down(SYNCHRONOUS)
    ann.train(0)
    ann.dispatcher._protocol.close()  # it is lost, in the middle of the step
    assert bob.train(0) == []  # Ann's second message was lost with her connection
    assert ann.heard == []
    again = Sharer(table, ANN, generation=2)
    ((first, tensors),) = again.train(0)
    assert isinstance(first, Tensors)
    assert set(tensors) == {"h.grad", "loss"}
    assert session_of(again).ledger.step == 1


def test_a_connection_that_was_replaced_leaves_what_comes_to_the_newer_one() -> None:
    table, ann, _ = sit_down(SYNCHRONOUS)
    ann.train(0)
    again = Sharer(table, ANN, generation=2)
    assert list(ann.dispatcher.take(make_end(tensors=GRADIENT, is_last=True))) == []
    ((_, tensors),) = again.say(FIRST, {"h": np.ones((2, 4), np.float32)})
    np.testing.assert_array_equal(tensors["h.grad"], GRADIENT["h.grad"])


def test_a_newer_connection_that_has_not_greeted_yet_holds_what_comes() -> None:
    table, ann, _ = sit_down(SYNCHRONOUS)
    ann.train(0)
    newer = Dispatcher(table.registry, pass_on=table.pass_on)
    received = newer.read(b"".join(encode_message(hello(2), {})))
    assert newer.enter(received) is None
    assert list(newer.take(make_end(tensors=GRADIENT, is_last=True))) == []
    list(newer.answer(received))
    sent = b"".join(encode_message(FIRST, {"h": np.ones((2, 4), np.float32)}))
    (reply,) = newer.handle(sent)
    tensors = decode_message(b"".join(reply))[1]
    np.testing.assert_array_equal(tensors["h.grad"], GRADIENT["h.grad"])


def test_what_comes_for_a_connection_without_a_session_is_dropped() -> None:
    table = Table(policy=SYNCHRONOUS)
    assert list(Dispatcher(table.registry).take(make_end(is_last=True))) == []
