"""What a server and its workers say to each other, as bytes."""

from __future__ import annotations

import dataclasses
import io
import struct
from typing import Any

import msgspec
import pytest

import splitonnx.errors
from splitonnx.errors import FormatError, NotFinite, SplitonnxError, StageFailed, StageTooSlow
from splitonnx.messages import TaskKey
from splitonnx.runtime.workers.blocks import Place, Slot, make_block
from splitonnx.runtime.workers.messages import (
    MAX_ANSWER,
    MAX_TEXT,
    RAISED,
    Action,
    Begin,
    Continue,
    Done,
    Failed,
    Fetch,
    Finish,
    FromWorker,
    Given,
    Need,
    Open,
    Request,
    Tidy,
    Work,
    describe_error,
    fill_slots,
    make_error,
    read_frame,
    write_frame,
)


def test_an_error_comes_back_as_the_same_one() -> None:
    for error in (NotFinite("loss", "nan at step 3"), StageTooSlow("body.step", 0.5)):
        made = make_error(describe_error(error))
        assert type(made) is type(error)
        assert str(made) == str(error)


@pytest.mark.parametrize(
    ("code", "facts"),
    [
        ("Unauthorized", ["a", 1, "b"]),
        ("StageFailed", ["a"]),
        ("StageFailed", ["a", "b" * 1001]),
        ("StageTooSlow", ["a", "no number"]),
        ("SystemExit", []),
        ("quote", ["a"]),
    ],
)
def test_an_error_that_no_executor_raises_is_refused(code: str, facts: list[object]) -> None:
    with pytest.raises(FormatError, match="a worker's answer"):
        make_error(Failed(code=code, facts=facts))  # type: ignore[arg-type]


# --- bytes --------------------------------------------------------------------------------------

KEY = TaskKey("a" * 32, "train", 3, 0)


class Narrow(io.BytesIO):
    """A pipe that takes and gives few bytes at a time, as pipes may."""

    def write(self, content: Any, /) -> int:
        return super().write(bytes(content)[:5])

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(3, size or 0))


def make_request(action: Action) -> Request:
    place = make_place()
    return Request(
        inbox=place,
        outbox=place,
        action=action,
        kept_bytes=7,
        abandoned=((1, KEY),),
        closed=(2, 3),
    )


def make_place() -> Place:
    block = make_block()
    try:
        return block.place
    finally:
        block.close()


ACTIONS = [
    Open(session=1, step=4, state=(Slot("W", "F32", (2, 3), 64),)),
    Open(session=1, step=0, state=None),
    Work(session=1, key=KEY, begin=Begin(seed=5, learning_rate=0.5), wires=()),
    Work(session=1, key=KEY, begin=None, wires=(Slot("h", "I64", (), 0),)),
    Continue(session=1, key=KEY),
    Finish(session=1, key=KEY),
    Fetch(session=1),
    Tidy(),
]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: type(action).__name__)
def test_a_request_comes_through_a_pipe_as_it_went_in(action: Action) -> None:
    pipe, request = Narrow(), make_request(action)
    write_frame(pipe, request)
    pipe.seek(0)
    assert msgspec.msgpack.decode(read_frame(pipe), type=Request) == request


@pytest.mark.parametrize(
    "answer",
    [Done(), Done(is_finished=True), Need(size=5), Given(tensors=()), Failed(code="x", facts=[1])],
    ids=lambda answer: type(answer).__name__,
)
def test_an_answer_comes_back_as_what_it_is(answer: FromWorker) -> None:
    pipe = Narrow()
    write_frame(pipe, answer)
    pipe.seek(0)
    assert msgspec.msgpack.decode(read_frame(pipe, MAX_ANSWER), type=FromWorker) == answer


def test_messages_follow_one_another_in_one_pipe() -> None:
    pipe = io.BytesIO()
    for size in (1, 2):
        write_frame(pipe, Need(size=size))
    pipe.seek(0)
    decoder = msgspec.msgpack.Decoder(FromWorker)
    assert [decoder.decode(read_frame(pipe)) for _ in range(2)] == [Need(size=1), Need(size=2)]
    with pytest.raises(EOFError):
        read_frame(pipe)


@pytest.mark.parametrize("kept", [0, 3, 8, 9])
def test_a_message_that_breaks_off_is_the_other_side_s_end(kept: int) -> None:
    pipe = io.BytesIO()
    write_frame(pipe, Need(size=5))
    with pytest.raises(EOFError):
        read_frame(io.BytesIO(pipe.getvalue()[:kept]))


def test_an_answer_over_the_limit_is_refused_at_its_announcement() -> None:
    announced = struct.pack("<Q", 1 << 40)
    with pytest.raises(FormatError, match=str(1 << 40)):
        read_frame(io.BytesIO(announced), MAX_ANSWER)


def test_what_is_unknown_is_no_answer() -> None:
    for content in (b"\xc0", msgspec.msgpack.encode({"type": "Shell", "command": "ls"})):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(content, type=FromWorker)


@pytest.mark.parametrize("action", [ACTIONS[0], ACTIONS[2]], ids=["Open", "Work"])
def test_an_action_is_given_the_places_of_its_tensors(action: Action) -> None:
    slots = (Slot("W", "F32", (1,), 128),)
    filled = fill_slots(action, slots)
    assert isinstance(filled, Open | Work)
    assert (filled.state if isinstance(filled, Open) else filled.wires) == slots


def test_an_action_without_tensors_has_no_places_for_any() -> None:
    with pytest.raises(AssertionError):
        fill_slots(Fetch(session=1), ())


@pytest.mark.parametrize("name", sorted(RAISED))
def test_every_error_of_an_executor_can_be_told(name: str) -> None:
    kind = getattr(splitonnx.errors, name)
    assert issubclass(kind, SplitonnxError)
    values: dict[str, Any] = {"int": 3, "int | None": 4, "float": 2.5, "str": "text"}
    facts = {
        field.name: values.get(str(field.type), ("a", "b")) for field in dataclasses.fields(kind)
    }
    error = kind(**facts)
    made = make_error(
        msgspec.msgpack.decode(msgspec.msgpack.encode(describe_error(error)), type=Failed)
    )
    assert (type(made), str(made)) == (kind, str(error))


def test_a_long_fact_is_cut_so_that_it_can_be_told() -> None:
    failed = describe_error(StageFailed("s", "x" * 5000), is_last=True)
    assert failed.is_last
    assert "x" * MAX_TEXT in str(make_error(failed))
    assert "x" * (MAX_TEXT + 1) not in str(make_error(failed))
