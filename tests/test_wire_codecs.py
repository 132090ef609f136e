"""Codecs as users write them."""

from __future__ import annotations

from typing import Any

import pytest

from splitonnx.errors import UsageError
from splitonnx.wire_codecs import PLAIN, Codec, CodecKind, WireCodecs, read_codec, read_wire

INT8 = Codec(kind=CodecKind.INT8)
BF16 = Codec(kind=CodecKind.BF16)
TENTH = Codec(kind=CodecKind.TOPK, fraction=0.1)


@pytest.mark.parametrize(
    ("text", "forward", "backward"),
    [
        ("int8", INT8, INT8),
        ("fwd=int8,bwd=bf16", INT8, BF16),
        (" bwd=bf16 , fwd=int8 ", INT8, BF16),
        ("fwd=int8", INT8, PLAIN),
        ("bwd=topk=0.1", PLAIN, TENTH),
        ("topk=0.1", TENTH, TENTH),
        ("fp32", PLAIN, PLAIN),
        ({"fwd": "int8", "bwd": "topk=0.1"}, INT8, TENTH),
        ({"bwd": "bf16"}, PLAIN, BF16),
        ("bwd=topk=0.1+ef", PLAIN, Codec(kind=CodecKind.TOPK, fraction=0.1, has_feedback=True)),
        ("bwd=int4+ef", PLAIN, Codec(kind=CodecKind.INT4, has_feedback=True)),
        (None, PLAIN, PLAIN),
        ({}, PLAIN, PLAIN),
    ],
)
def test_a_codec_is_for_both_directions_or_each_has_its_own(
    text: str | dict[str, str] | None, forward: Codec, backward: Codec
) -> None:
    assert read_wire(text) == WireCodecs(forward=forward, backward=backward)


@pytest.mark.parametrize("text", ["int8", "fwd=int8,bwd=bf16", "fwd=topk=0.05,bwd=randtopk=0.1+ef"])
def test_codecs_are_written_as_they_are_read(text: str) -> None:
    assert str(read_wire(text)) == text


def test_what_sends_tensors_as_they_are_is_plain() -> None:
    assert read_wire("fp32").is_plain
    assert not read_wire("bwd=int8").is_plain


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int9", "there is no codec 'int9'; choose one of 'fp32', 'fp16'"),
        ("", "there is no codec ''"),
        ("up=int8", "there is no direction 'up'; write fwd=... or bwd=..."),
        ("int8,bwd=bf16", "two codecs for bwd, int8 and bf16; name one"),
        ("int8=3", "there is no direction 'int8'"),
        ("topk", "'topk' should say which part of the numbers is kept, between 0 and 1"),
        ("topk=2", "between 0 and 1, as topk=0.1"),
        ("topk=nan", "between 0 and 1"),
        ("bwd=fp32+ef", "fp32 leaves nothing out, so 'fp32+ef' has no feedback"),
        ("fwd=randtopk=x", "between 0 and 1, as randtopk=0.1"),
    ],
)
def test_what_is_no_codec_is_refused_with_those_that_there_are(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_wire(text)
    assert reason in str(caught.value)


def test_a_codec_without_a_fraction_takes_no_number() -> None:
    with pytest.raises(UsageError, match="the codec int8 takes no number, but 'int8=3' has one"):
        read_codec("int8=3")


@pytest.mark.parametrize("wire", [["int8"], 5, {"fwd": None}])
def test_what_is_no_text_and_no_dictionary_of_texts_is_refused(wire: Any) -> None:
    with pytest.raises(UsageError, match="must be a text"):
        read_wire(wire)
