"""What is said comes back as it was said, and what cannot be said is refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from splitonnx.codecs import encode_tensors
from splitonnx.errors import FormatError
from splitonnx.manifests import Wire, WireKind
from splitonnx.messages import (
    Bye,
    Fault,
    Hello,
    Login,
    Message,
    Save,
    Saved,
    TaskKey,
    Tensors,
    Unsaved,
    Welcome,
    decode_message,
    encode_message,
    is_bye,
)
from splitonnx.tensors import TensorSpec
from tests.conftest import ROOT

WIRE = Wire(
    tensor=TensorSpec(name="h@server", dtype="F32", shape=("N", 3, None), bounds=None),
    sender="client",
    receiver="server",
    kind=WireKind.ACTIVATION,
)
TASK = Tensors(
    session="s", phase="train", step=2**40, micro_batch=0, turn=1, seed=7, learning_rate=0.1 + 0.2
)
EVERY: list[Message] = [
    Login(token="secret"),
    Hello(
        digest="d",
        session="s",
        origin="o",
        start=1,
        generation=2,
        step=3,
        kept=(3, 2),
        is_open=True,
        can_share=True,
        wires={"train": (WIRE,)},
    ),
    Welcome(session="s", digest="d", step=3, wires={"train": (WIRE,)}),
    Welcome(
        session="s",
        digest="d",
        step=3,
        policy="splitfed-v1",
        local_steps=2,
        rounds=7,
        wires={"train": (WIRE,)},
    ),
    TASK,
    Save(session="s", step=3, publish=True),
    Save(session="s", step=3, keep=True),
    Saved(session="s", step=3, keep=True),
    Saved(session="s", step=3),
    Unsaved(session="s", step=3, reason="no space left"),
    Fault(code="StaleConnection", reason="später", newest=3),
    Bye(),
]


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_as_it_was(message: Message) -> None:
    assert decode_message(b"".join(encode_message(message))) == (message, {})


@pytest.mark.parametrize("kind", [Hello, Welcome])
def test_a_side_of_an_earlier_version_has_one_task_open(kind: type[Hello] | type[Welcome]) -> None:
    now = next(message for message in EVERY if isinstance(message, kind))
    fields = msgspec.to_builtins(now)
    assert fields.pop("in_flight") == 1
    earlier = {"splitonnx": msgspec.json.encode({**fields, "later": True}).decode()}
    assert decode_message(b"".join(encode_tensors({}, earlier))) == (now, {})


def test_tensors_travel_with_their_message() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    message, tensors = decode_message(b"".join(encode_message(TASK, {"h@server": array})))
    assert isinstance(message, Tensors)
    assert message.key == TaskKey("s", "train", 2**40, 0)
    np.testing.assert_array_equal(tensors["h@server"], array)


def test_a_recorded_message_can_be_read_by_the_safetensors_library() -> None:
    array = np.arange(6, dtype=np.float32)
    content = b"".join(encode_message(TASK, {"h": array}))
    np.testing.assert_array_equal(safetensors.numpy.load(content)["h"], array)


def test_only_tensors_carry_tensors() -> None:
    content = b"".join(encode_message(Bye(), {"x": np.zeros(1)}))
    with pytest.raises(FormatError, match="Bye carries no tensors"):
        decode_message(content)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"splitonnx": "{}"},
        {"splitonnx": "nonsense"},
        {"splitonnx": '{"type":"Shout"}'},
        {"splitonnx": '{"type":"Save","session":"s"}'},
        {"splitonnx": '{"type":"Save","session":"s","step":"3"}'},
        {"splitonnx": '{"type":"Save","session":"s","step":-1}'},
        {"splitonnx": f'{{"type":"Save","session":"s","step":{2**63}}}'},
        {"splitonnx": f'{{"type":"Save","session":"s","step":{"9" * 4300}}}'},
        {"splitonnx": '{"type":"Save","session":"s","step":1.5}'},
        # after this generation there is no next one, with which the client would greet
        {"splitonnx": f'{{"type":"Fault","code":"c","reason":"r","newest":{2**63 - 1}}}'},
        {"splitonnx": '{"type":"Bye"}', "other": ""},
    ],
)
def test_what_is_no_message_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(FormatError):
        decode_message(b"".join(encode_tensors({}, metadata)))


def test_every_type_is_known_to_msgspec_before_threads_read_messages() -> None:
    """msgspec ends the process where two threads meet a type for the first time at once.

    A decoder that is made while its module is imported meets it before; ``decode`` with a type does
    not.
    """
    for folder in ("splitonnx", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "msgspec.json.decode(" not in path.read_text(), path


def test_a_goodbye_is_told_from_other_messages_and_from_none() -> None:
    assert is_bye(b"".join(encode_message(Bye())))
    assert not is_bye(b"".join(encode_message(Login(token="t"))))
    assert not is_bye(b"nothing")
