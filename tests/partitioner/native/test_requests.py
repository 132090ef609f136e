"""Frames and requests: what was written is read, and a kept content is sent once."""

from __future__ import annotations

import gc
import io

import pytest

from splitonnx.partitioner.native.requests import (
    Kept,
    RequestReader,
    RequestWriter,
    keep,
    keeping_contents,
    read_frame,
    write_frame,
)


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 300])
def test_a_frame_is_read_as_it_was_written(content: bytes) -> None:
    stream = io.BytesIO()
    write_frame(stream, content)
    write_frame(stream, b"next")
    stream.seek(0)
    assert read_frame(stream) == content
    assert read_frame(stream) == b"next"


@pytest.mark.parametrize("length", [0, 3, 8, 11])
def test_a_frame_that_ends_early_means_that_the_other_side_is_gone(length: int) -> None:
    stream = io.BytesIO()
    write_frame(stream, b"content")
    with pytest.raises(EOFError):
        read_frame(io.BytesIO(stream.getvalue()[:length]))


def test_a_request_is_read_as_it_was_written() -> None:
    writer, reader = RequestWriter(), RequestReader()
    arguments = ["text", 5, None, [{"a": b"bytes"}], {"b": [1.5, b""]}]
    assert reader.read(writer.write("function", arguments)) == ("function", arguments)


def test_a_kept_content_is_sent_once_and_read_each_time() -> None:
    writer, reader = RequestWriter(), RequestReader()
    kept, other = Kept(b"x" * 1000), Kept(b"y" * 1000)
    first = writer.write("f", [kept, {"batch": [kept, b"own"]}])
    assert 1000 < len(first) < 1100
    assert reader.read(first) == ("f", [kept.content, {"batch": [kept.content, b"own"]}])
    second = writer.write("f", [kept, other])
    assert 1000 < len(second) < 1100
    assert reader.read(second) == ("f", [kept.content, other.content])
    assert writer.kept_bytes == reader.kept_bytes == 2000


def test_a_content_that_nobody_has_any_more_is_not_kept() -> None:
    writer, reader = RequestWriter(), RequestReader()
    kept, other = Kept(bytes(1000)), Kept(bytes(10))
    reader.read(writer.write("f", [kept, other]))
    del kept
    gc.collect()
    assert reader.kept_bytes == 1010
    reader.read(writer.write("f", []))
    assert writer.kept_bytes == reader.kept_bytes == 10
    assert reader.read(writer.write("f", [other])) == ("f", [bytes(10)])


def test_each_process_is_sent_what_it_does_not_have() -> None:
    kept = Kept(b"content")
    for _ in range(2):
        assert RequestReader().read(RequestWriter().write("f", [kept])) == ("f", [b"content"])


def test_a_request_that_cannot_be_written_leaves_nothing_out_of_the_next_one() -> None:
    writer, kept = RequestWriter(), Kept(b"content")
    with pytest.raises(NotImplementedError, match="a request with a object"):
        writer.write("f", [kept, object()])
    assert RequestReader().read(writer.write("f", [kept])) == ("f", [b"content"])


def test_equal_contents_are_one_within_a_block_and_none_is_held_behind_it() -> None:
    assert keep(b"a") is not keep(b"a")
    with keeping_contents():
        first = keep(b"a" * 100)
        with keeping_contents():
            assert keep(b"a" * 100) is first
        assert keep(b"a" * 100) is first
        assert keep(b"a" * 99 + b"b") is not first
        assert keep(b"a" * 101) is not first
    assert keep(b"a" * 100) is not first
