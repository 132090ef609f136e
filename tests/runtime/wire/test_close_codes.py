"""How a connection ended, as its sentence and its closing code tell."""

from __future__ import annotations

import pytest
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK
from websockets.frames import Close

from splitonnx.messages import REPLACED
from splitonnx.runtime.wire.close_codes import BUSY, POLICY, RESTART, TOO_BIG, describe_loss

OURS = Close(1001, "going away")
THEIRS = Close(RESTART, "the server restarts")


def test_the_other_side_s_closing_code_is_told() -> None:
    lost = describe_loss("ws://lab.example", ConnectionClosedError(THEIRS, None))
    assert (lost.peer, lost.code) == ("ws://lab.example", RESTART)
    assert "the server restarts" in str(lost)


def test_where_both_said_good_bye_the_other_side_s_word_counts() -> None:
    assert describe_loss("x", ConnectionClosedOK(THEIRS, OURS, True)).code == RESTART


def test_where_this_side_alone_did_its_own_word_does() -> None:
    assert describe_loss("x", ConnectionClosedError(None, OURS)).code == 1001


def test_without_a_good_bye_there_is_no_code() -> None:
    lost = describe_loss("x", ConnectionClosedError(None, None))
    assert lost.code is None
    assert lost.reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("connection\n  reset"), "connection reset"),
        (TimeoutError(), "TimeoutError"),
        (EOFError("  "), "EOFError"),
    ],
)
def test_an_error_of_the_system_is_told_on_one_line_or_by_its_name(
    error: Exception, reason: str
) -> None:
    lost = describe_loss("x", error)
    assert (lost.reason, lost.code) == (reason, None)


def test_what_a_peer_wrote_cannot_break_the_line() -> None:
    lost = describe_loss("x", ConnectionClosedError(Close(1011, "a\x1b[2J\nb"), None))
    assert str(lost).isprintable()


def test_each_end_has_a_code_of_its_own_that_websockets_may_carry() -> None:
    codes = [RESTART, BUSY, POLICY, TOO_BIG, REPLACED]
    assert len(set(codes)) == len(codes)
    for code in codes:
        Close(code, "").check()
