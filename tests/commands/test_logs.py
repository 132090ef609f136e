"""The log of a command: lines for people and for machines, and nothing that a peer could forge."""

from __future__ import annotations

import json
import logging
import re

import pytest

from splitonnx.commands.logs import (
    LINES_PER_SECOND,
    LogFormat,
    LogLevel,
    escape,
    logging_to_stderr,
    silencing,
)

_logger = logging.getLogger("splitonnx.test")


def test_lines_for_people_have_the_fields_that_the_sentence_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with logging_to_stderr():
        _logger.info("%s came", "10.0.0.1:5", extra={"peer": "10.0.0.1:5", "session": "ab12"})
        _logger.debug("unheard")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d\d:\d\d:\d\d  10\.0\.0\.1:5 came  session=ab12\n", line)


def test_lines_for_machines_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr(LogLevel.DEBUG, LogFormat.JSON):
        _logger.warning("lost", extra={"peer": "x", "step": 7, "seconds": 0.5, "color": "red"})
        _logger.debug("quiet")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "warning",
        "logger": "splitonnx.test",
        "event": "lost",
        "peer": "x",
        "step": 7,
        "seconds": 0.5,
    }
    assert second["event"] == "quiet"


@pytest.mark.parametrize("log_format", LogFormat)
@pytest.mark.parametrize(
    "hostile", ["a\nb", "a\r12:00:00  forged", "\x1b[31mred", "\u202egnp", "\x00", "\u2028", "\x85"]
)
def test_what_a_peer_sent_begins_no_line_and_colours_none(
    capsys: pytest.CaptureFixture[str], log_format: LogFormat, hostile: str
) -> None:
    with logging_to_stderr(log_format=log_format):
        _logger.info("it said %s", hostile, extra={"reason": hostile + "!"})
    text = capsys.readouterr().err
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    assert text.count("\n") == 1


def test_escaping_leaves_what_prints() -> None:
    assert escape("naïve 漢字 'x'") == "naïve 漢字 'x'"
    assert escape("a\tb\x1b\n") == r"a\tb\x1b\n"


@pytest.mark.parametrize("log_format", LogFormat)
def test_a_traceback_stands_with_its_event(
    capsys: pytest.CaptureFixture[str], log_format: LogFormat
) -> None:
    with logging_to_stderr(log_format=log_format):
        try:
            raise RuntimeError("broken")
        except RuntimeError:
            _logger.exception("it failed")
    assert "RuntimeError: broken" in capsys.readouterr().err


def test_a_crowd_cannot_fill_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr(log_format=LogFormat.JSON):
        for _ in range(50 * LINES_PER_SECOND):
            _logger.warning("refused")
        _logger.error("something of our own")
    *refused, last = map(json.loads, capsys.readouterr().err.splitlines())
    assert LINES_PER_SECOND <= len(refused) <= 10 * LINES_PER_SECOND
    assert last["event"] == "something of our own"
    left_out = sum(event.get("left_out", 0) for event in (*refused, last))
    assert len(refused) + left_out == 50 * LINES_PER_SECOND


def test_afterwards_logging_is_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger("splitonnx")
    before = list(root.handlers), root.level, root.propagate
    with logging_to_stderr(LogLevel.DEBUG):
        assert root.level == logging.DEBUG
    assert (root.handlers, root.level, root.propagate) == before
    _logger.info("unheard")
    assert capsys.readouterr().err == ""


def test_silenced_loggers_print_nothing_and_are_as_they_were_afterwards(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("splitonnx.test_logs.silenced")
    with silencing(logger.name):
        logger.error("not to be seen")
        assert not caplog.records
    assert capsys.readouterr().err == ""
    logger.error("to be seen")
    assert caplog.messages == ["to be seen"]
