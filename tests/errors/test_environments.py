"""Errors of what a run stands on: each names what is missing and what to do."""

from __future__ import annotations

import pytest

from splitonnx.errors import (
    InternalRuntimeError,
    MissingExtra,
    ProcessFailed,
    SplitonnxError,
    StageFailed,
    StageStopped,
    StageTooSlow,
    UsageError,
    WrongRuntime,
)
from tests.support.sentences import check_sentence


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (MissingExtra("onnx", "cpu", "cut"), ("cut", "'onnx'", "pip install 'splitonnx[cpu]'")),
        (WrongRuntime("1.32", "the training build"), ("1.32", "the training build")),
        (ProcessFailed("a.worker", "no memory"), ("no memory", "python -m a.worker")),
        (UsageError("say one or the other"), ("say one or the other",)),
        (StageFailed("body.step", "no memory"), ("'body.step'", "no memory")),
        (
            InternalRuntimeError("stage 'body.step'", "KeyError: 'h'"),
            ("mistake in splitonnx", "stage 'body.step'", "KeyError: 'h'", "report"),
        ),
        (StageTooSlow("body.step", 0.5), ("'body.step'", "0.5 s", "--max-stage-seconds")),
        (StageStopped("body.step"), ("'body.step'",)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_sentence_holds_the_facts_and_the_next_thing_to_try(
    error: SplitonnxError, facts: tuple[object, ...]
) -> None:
    check_sentence(error, *facts)


def test_facts_can_be_read_without_the_sentence() -> None:
    error = MissingExtra("onnx", "cpu", "cut")
    assert (error.module, error.extra, error.purpose) == ("onnx", "cpu", "cut")
