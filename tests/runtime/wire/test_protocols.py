"""The protocol as a table: who may say what when, and what is held against the manifest."""

from __future__ import annotations

from itertools import product

import msgspec
import numpy as np
import pytest

from splitonnx.errors import (
    ArrayMismatch,
    BundleMismatch,
    LocalProtocolError,
    RemoteProtocolError,
    ValueOutOfRange,
)
from splitonnx.manifests import PartyManifest
from splitonnx.messages import (
    Bye,
    Fault,
    Hello,
    Login,
    Message,
    Save,
    Saved,
    Tensors,
    Unsaved,
    Welcome,
    encode_message,
)
from splitonnx.micro_batches import MOST_IN_FLIGHT
from splitonnx.names import CLIENT, SERVER
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.wire.protocols import MOVES, Protocol, State, list_wires
from tests.support.zoo import ZOO

BUNDLE = cut(ZOO["chain"].build(), at="act1")
assert BUNDLE.server is not None
MANIFESTS = {CLIENT: BUNDLE.client.manifest, SERVER: BUNDLE.server.manifest}
ACTIVATION, GRADIENT = "act1@server", "act1@server_grad"


def make_messages(manifest: PartyManifest) -> list[Message]:
    wires = list_wires(manifest)
    return [
        Login(token="t"),
        Hello(digest=manifest.digest, session="s", step=0, wires=wires),
        Welcome(session="s", digest=manifest.digest, step=0, wires=wires),
        make_task(),
        Save(session="s", step=0),
        Saved(session="s", step=0),
        Unsaved(session="s", step=0, reason="full"),
        Fault(code="X", reason="y"),
        Bye(),
    ]


def make_task(step: int = 0) -> Tensors:
    return Tensors(
        session="s", phase="train", step=step, micro_batch=0, turn=0, seed=0, learning_rate=1e-3
    )


def bring(protocol: Protocol, state: State) -> Protocol:
    protocol.state = state
    return protocol


MESSAGES = make_messages(MANIFESTS[CLIENT])
HELLO, WELCOME = MESSAGES[1:3]


@pytest.mark.parametrize(("state", "role"), [*product(State, (CLIENT, SERVER))])
def test_the_table_alone_says_what_may_be_sent_and_received(state: State, role: str) -> None:
    peer = SERVER if role == CLIENT else CLIENT
    for message in MESSAGES:
        sender = bring(Protocol(MANIFESTS[role], role), state)
        receiver = bring(Protocol(MANIFESTS[peer], peer), state)
        following = MOVES.get((state, role, type(message)))
        if following is None:
            with pytest.raises(LocalProtocolError):
                sender.send(message)
            with pytest.raises(RemoteProtocolError):
                receiver.receive(b"".join(encode_message(message)))
            assert sender.state == receiver.state == state
        else:
            receiver.receive(b"".join(sender.send(message)))
            assert sender.state == receiver.state == following


def test_nothing_can_be_said_after_the_end() -> None:
    assert not [move for move in MOVES if move[0] is State.CLOSED]


def open_pair() -> tuple[Protocol, Protocol]:
    client, server = (Protocol(MANIFESTS[role], role) for role in (CLIENT, SERVER))
    server.receive(b"".join(client.send(HELLO)))
    client.receive(b"".join(server.send(WELCOME)))
    return client, server


def test_a_task_goes_there_and_back() -> None:
    client, server = open_pair()
    labels = np.zeros(5, np.int64)
    sent: dict[str, np.ndarray] = {ACTIVATION: np.ones((5, 7), np.float32), "labels@server": labels}
    message, tensors = server.receive(b"".join(client.send(make_task(), sent)))
    assert message == make_task()
    np.testing.assert_array_equal(tensors[ACTIVATION], sent[ACTIVATION])
    back = {GRADIENT: np.ones((5, 7), np.float32)}
    _, tensors = client.receive(b"".join(server.send(make_task(), back)))
    assert tensors.keys() == {GRADIENT}


def test_a_wire_of_another_shape_is_refused_before_anything_runs() -> None:
    _, server = open_pair()
    wrong = encode_message(make_task(), {ACTIVATION: np.ones((5, 8), np.float32)})
    with pytest.raises(ArrayMismatch, match=r"F32\[N, 7\], but is F32\[5, 8\]"):
        server.receive(b"".join(wrong))


def test_the_batch_is_one_number_throughout_a_task() -> None:
    client, _ = open_pair()
    client.send(make_task(), {ACTIVATION: np.ones((5, 7), np.float32)})
    late = encode_message(make_task(), {GRADIENT: np.ones((6, 7), np.float32)})
    with pytest.raises(ArrayMismatch, match="N = 5"):
        client.receive(b"".join(late))
    client.send(make_task(1), {ACTIVATION: np.ones((6, 7), np.float32)})


def test_each_open_task_has_a_batch_of_its_own() -> None:
    client, server = open_pair()
    tasks = [
        msgspec.structs.replace(make_task(), phase="accumulate", micro_batch=n) for n in (0, 1)
    ]
    for rows, task in zip((5, 6), tasks, strict=True):
        server.receive(b"".join(client.send(task, {ACTIVATION: np.ones((rows, 7), np.float32)})))
    for rows, task in zip((5, 6), tasks, strict=True):
        assert server.list_sizes(task.key) == {"N": rows}
        with pytest.raises(ArrayMismatch, match=f"N = {rows}"):
            server.send(task, {GRADIENT: np.ones((7, 7), np.float32)})
        client.receive(b"".join(server.send(task, {GRADIENT: np.ones((rows, 7), np.float32)})))


def test_a_task_that_begins_again_may_have_another_batch() -> None:
    client, server = open_pair()
    for rows in (5, 6):
        sent = {ACTIVATION: np.ones((rows, 7), np.float32)}
        server.receive(b"".join(client.send(make_task(), sent)))
        assert server.list_sizes(make_task().key) == {"N": rows}


def test_the_sizes_of_few_tasks_are_kept() -> None:
    client, server = open_pair()
    for step in range(100):
        sent = {ACTIVATION: np.ones((5, 7), np.float32)}
        server.receive(b"".join(client.send(make_task(step), sent)))
    known = [step for step in range(100) if server.list_sizes(make_task(step).key)]
    assert MOST_IN_FLIGHT <= len(known) < 20
    assert known[-1] == 99


def test_labels_on_the_wire_are_held_to_their_range() -> None:
    _, server = open_pair()
    wrong = encode_message(make_task(), {"labels@server": np.array([0, 4])})
    with pytest.raises(ValueOutOfRange, match="holds 4"):
        server.receive(b"".join(wrong))


def test_a_tensor_that_is_no_wire_of_the_sender_is_refused() -> None:
    client, server = open_pair()
    back = encode_message(make_task(), {GRADIENT: np.ones((5, 7), np.float32)})
    with pytest.raises(RemoteProtocolError, match=GRADIENT):
        server.receive(b"".join(back))
    with pytest.raises(LocalProtocolError, match="weights"):
        client.send(make_task(), {"weights": np.ones(3, np.float32)})


@pytest.mark.parametrize("phase", ["evaluate", "x" * 100_000])
def test_a_phase_in_which_nothing_travels_is_refused_before_anything_is_kept_of_it(
    phase: str,
) -> None:
    receiver = Protocol(MANIFESTS[SERVER], SERVER)
    receiver.state = State.OPEN
    content = b"".join(encode_message(msgspec.structs.replace(make_task(), phase=phase)))
    with pytest.raises(RemoteProtocolError, match="there is no phase") as caught:
        receiver.receive(content)
    assert len(str(caught.value)) < 200


def test_greetings_of_different_bundles_name_both_sides() -> None:
    for field, value in (("digest", "other"), ("protocol", 9)):
        server = Protocol(MANIFESTS[SERVER], SERVER)
        hello = msgspec.structs.replace(HELLO, **{field: value})
        with pytest.raises(BundleMismatch) as caught:
            server.receive(b"".join(encode_message(hello)))
        assert str(value) in str(caught.value)
        assert caught.value.local in str(caught.value)


def test_every_field_of_every_wire_is_compared() -> None:
    wire = MANIFESTS[CLIENT].phase("train").wires[0]
    variants = [
        msgspec.structs.replace(wire, sender="server"),
        msgspec.structs.replace(wire, tensor=msgspec.structs.replace(wire.tensor, dtype="F16")),
        msgspec.structs.replace(wire, tensor=msgspec.structs.replace(wire.tensor, shape=("N", 6))),
    ]
    for variant in variants:
        wires = list_wires(MANIFESTS[CLIENT])
        wires["train"] = (variant, *wires["train"][1:])
        hello = msgspec.structs.replace(HELLO, wires=wires)
        with pytest.raises(BundleMismatch, match=wire.tensor.name):
            Protocol(MANIFESTS[SERVER], SERVER).receive(b"".join(encode_message(hello)))


@pytest.mark.parametrize("content", [b"", bytes(64), b"GET / HTTP/1.1\r\n\r\n"])
def test_what_is_no_message_breaks_the_protocol(content: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Protocol(MANIFESTS[SERVER], SERVER).receive(content)
