"""A slice of the fuzzing of bytes, without atheris: its inputs, and some mutants of them."""

from __future__ import annotations

from random import Random

import pytest
from onnx import ModelProto

from tests.byte_fuzzing.corpora import list_inputs, list_words, write_program
from tests.byte_fuzzing.framings import frame_protobuf
from tests.byte_fuzzing.targets import TARGETS
from tests.support.zoo import ZOO

MUTANTS = 1500


def mutate(random: Random, content: bytes, words: list[bytes]) -> bytes:
    """Change an input in some places, as libFuzzer does without coverage."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(changed) + 1)
        removed = random.choice((0, 0, 1, 1, 2, 8))
        added = random.choice((b"", random.randbytes(1), random.choice(words)))
        changed[place : place + removed] = added
    return bytes(changed)


@pytest.mark.parametrize("target", TARGETS)
def test_the_inputs_and_their_mutants_are_read_or_refused_by_name(target: str) -> None:
    inputs, words, random = list_inputs(target), list_words(target), Random(target)
    for content in inputs:
        TARGETS[target](content)
    for _ in range(MUTANTS):
        TARGETS[target](mutate(random, random.choice(inputs), words))


@pytest.mark.parametrize("name", ZOO)
def test_a_program_of_a_model_makes_the_model(name: str) -> None:
    model = ZOO[name].build()
    for tensor in model.graph.initializer:
        tensor.raw_data = tensor.raw_data[:200]  # a program has no more in one piece
    content = model.SerializeToString()
    program = write_program(content, ModelProto.DESCRIPTOR)
    assert frame_protobuf(b"p" + program) == content
    assert frame_protobuf(b"r" + content) == content


def test_words_are_as_long_as_libfuzzer_takes_them() -> None:
    for target in TARGETS:
        words = list_words(target)
        assert len(words) > 50
        assert all(1 <= len(word) <= 64 for word in words), target
