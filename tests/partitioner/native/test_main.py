"""The process for native code answers in order, and keeps what it is to keep; here in process."""

from __future__ import annotations

import faulthandler
import io
from collections.abc import Sequence

import msgspec
import pytest
from onnx import helper

from splitonnx.partitioner.native import main
from splitonnx.partitioner.native.main import serve
from splitonnx.partitioner.native.requests import Kept, RequestWriter, read_frame, write_frame
from tests.partitioner.native.test_natives import make_model


def ask(requests: Sequence[bytes], monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Let ``serve`` answer requests, without the limits that are for a process of its own."""
    monkeypatch.setattr(main, "_limit_memory", lambda size: None)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: None)
    source, sink = io.BytesIO(), io.BytesIO()
    for request in requests:
        write_frame(source, request)
    source.seek(0)
    serve(source, sink)
    sink.seek(0)
    assert read_frame(sink) == b""  # ready
    answers = [read_frame(sink) for _ in requests]
    assert sink.read() == b""
    return answers


def test_requests_are_answered_in_order_and_errors_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(helper.make_node("Relu", ["x"], ["y"]))
    requests = [
        RequestWriter().write("check_form", [model]),
        RequestWriter().write("check_form", [b"no model"]),
        RequestWriter().write("explode", []),
        b"\xc1 no request",
        RequestWriter().write("list_types", [model]),
    ]
    good, bad, unknown, broken, types = [
        msgspec.msgpack.decode(answer) for answer in ask(requests, monkeypatch)
    ]
    assert good == [None]
    assert len(bad) == 2
    assert unknown[0] == "KeyError"
    assert len(broken) == 2
    assert types == [{"y": "tensor(float)"}]


def test_a_content_that_was_sent_before_is_there_until_it_is_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer, kept = RequestWriter(), Kept(make_model(helper.make_node("Relu", ["x"], ["y"])))
    requests = [writer.write("list_types", [kept]) for _ in range(3)]
    del kept
    requests.append(writer.write("list_types", [b""]))
    assert len(requests[1]) < 50 < len(requests[0])
    answers = [msgspec.msgpack.decode(answer) for answer in ask(requests, monkeypatch)]
    assert answers[:3] == [[{"y": "tensor(float)"}]] * 3
    assert len(answers[3]) == 2  # refused
    late = ask([requests[0], requests[3], requests[1]], monkeypatch)[-1]
    assert msgspec.msgpack.decode(late)[0] == "KeyError"


def test_memory_is_limited_by_what_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, kept, sizes = RequestWriter(), Kept(bytes(5000)), list[int]()
    requests = [writer.write("list_types", [kept]) for _ in range(2)]
    ask(requests, monkeypatch)  # which sets the limits aside
    monkeypatch.setattr(main, "_limit_memory", sizes.append)
    source, sink = io.BytesIO(), io.BytesIO()
    for request in requests:
        write_frame(source, request)
    source.seek(0)
    serve(source, sink)
    assert sizes[0] > 5000
    assert sizes[1] == len(requests[1]) + 5000
