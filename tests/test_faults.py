"""Mistakes of ours: they are owned up to, named by what was at work, and logged once."""

from __future__ import annotations

import logging

import pytest

from splitonnx.errors import InternalRuntimeError, StageFailed
from splitonnx.faults import LOGGER, attribute_errors_to_us, log_mistake


@pytest.mark.parametrize("kind", [AttributeError, KeyError, OSError, TypeError, ValueError])
def test_any_error_that_is_not_raised_on_purpose_is_ours(kind: type[Exception]) -> None:
    with pytest.raises(InternalRuntimeError) as caught, attribute_errors_to_us("stage 'a.b'"):
        raise kind("no such thing")
    sentence = str(caught.value)
    for part in ("stage 'a.b'", kind.__name__, "no such thing", "please report it"):
        assert part in sentence
    assert sentence.isprintable()
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize("error", [StageFailed("a", "b"), MemoryError(), KeyboardInterrupt()])
def test_what_is_no_mistake_passes_unchanged(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(type(error)) as caught, attribute_errors_to_us("a stage"):
        raise error
    assert caught.value is error
    assert not caplog.records


def test_a_mistake_is_logged_as_an_error_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(InternalRuntimeError), attribute_errors_to_us("a stage"):
        raise TypeError("it is None")
    (record,) = caplog.records
    assert (record.name, record.levelno) == (LOGGER, logging.ERROR)
    assert record.getMessage() == "a mistake in splitonnx: a stage (TypeError: it is None)"
    assert "in test_a_mistake_is_logged_as_an_error_with_its_traceback" in caplog.text


def test_a_mistake_can_be_logged_where_another_error_is_made_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log_mistake("a pass", IndexError("7"))
    assert "a mistake in splitonnx: a pass (IndexError: 7)" in caplog.text
