"""Codecs by their names, and the bytes that they send."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.partitioner.cutting.transforms.choices import count_bytes, make_encoding
from splitonnx.partitioner.cutting.transforms.sparsifications import RandomTopK, TopK
from splitonnx.tensors import TensorSpec
from splitonnx.wire_codecs import PLAIN, CodecKind, read_codec
from tests.support.encodings import encode

SHAPE = (32, 8, 5, 5)
CODECS = ["fp16", "bf16", "int8", "int4", "topk=0.1", "randtopk=0.1"]


@pytest.mark.parametrize("text", CODECS)
def test_the_bytes_counted_are_those_of_what_is_sent(text: str) -> None:
    codec = read_codec(text)
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    sent = encode(lambda key: make_encoding(codec, "x", key), x)
    counted = count_bytes(codec, TensorSpec(name="x", dtype="F32", shape=SHAPE))
    assert counted == sum(array.nbytes for array in sent.values()) < x.nbytes


def test_every_kind_of_codec_is_tried_here() -> None:
    assert {read_codec(text).kind for text in CODECS} == {*CodecKind} - {CodecKind.FP32}


def test_what_is_not_encoded_has_the_bytes_of_its_type() -> None:
    floats = TensorSpec(name="x", dtype="F32", shape=SHAPE)
    assert count_bytes(PLAIN, floats) == 4 * 32 * 200
    integers = TensorSpec(name="x", dtype="I64", shape=(32, 7))
    assert count_bytes(read_codec("int8"), integers) == 8 * 32 * 7


def test_what_cannot_be_encoded_has_no_bytes() -> None:
    assert count_bytes(read_codec("int8"), TensorSpec(name="x", dtype="F32", shape=(32,))) is None


def test_nothing_is_drawn_without_a_key() -> None:
    made = make_encoding(read_codec("randtopk=0.1"), "x", None)
    assert isinstance(made, TopK)
    assert not isinstance(made, RandomTopK)
