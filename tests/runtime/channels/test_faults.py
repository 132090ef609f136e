"""What a server reports becomes the error that it raised."""

from __future__ import annotations

import pytest

from splitonnx.errors import (
    BatchTooLarge,
    NotFinite,
    NotPermitted,
    RemoteFault,
    RemoteProtocolError,
    ServerBusy,
    SplitonnxError,
    StaleConnection,
    TaskTooLarge,
)
from splitonnx.messages import Fault, Save, Saved, Unsaved
from splitonnx.runtime.channels.faults import read_saved, translate_fault


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Fault(code="StaleConnection", reason="", newest=7), StaleConnection, "7"),
        (Fault(code="ServerBusy", reason="sessions"), ServerBusy, "sessions"),
        (Fault(code="NotFinite", reason="step 3", subject="h"), NotFinite, "step 3, at the server"),
        (
            Fault(code="BatchTooLarge", reason="", subject="h", needed=9, limit=8),
            BatchTooLarge,
            "9",
        ),
        (
            Fault(code="NotPermitted", reason="open a session", subject="train"),
            NotPermitted,
            "open a session",
        ),
        (Fault(code="TaskTooLarge", reason="", needed=9, limit=8), TaskTooLarge, ""),
        (Fault(code="SessionLost", reason="gone"), RemoteFault, "gone"),
    ],
)
def test_a_fault_is_raised_as_what_it_was(
    fault: Fault, kind: type[SplitonnxError], words: str
) -> None:
    error = translate_fault(fault, 3)
    assert type(error) is kind
    assert words in str(error)


@pytest.mark.parametrize("code", ["ServerBusy", "NotFinite", "NotPermitted", "NoSuchCode"])
def test_what_a_server_says_becomes_one_short_line(code: str) -> None:
    """It could otherwise write to the user's terminal, or fill the log."""
    hostile = "\x1b[31m\nsplitonnx: all saved\x07" + "x" * 5000
    error = translate_fault(Fault(code=code, reason=hostile, subject=hostile), 1)
    assert str(error).isprintable()
    assert len(str(error)) < 1000
    assert all(str(value).isprintable() for name, value in vars(error).items() if name != "code")


def test_why_a_server_did_not_save_is_one_short_line_and_never_empty() -> None:
    asked = Save(session="5" * 32, step=3)
    for said, expected in (("\x1b[2Jfull", "[2Jfull"), ("", "no reason given")):
        reason = read_saved(asked, Unsaved(session=asked.session, step=3, reason=said))
        assert reason.isprintable()
        assert expected in reason


def test_an_answer_for_another_session_is_refused() -> None:
    asked = Save(session="5" * 32, step=3)
    with pytest.raises(RemoteProtocolError, match="another session"):
        read_saved(asked, Saved(session="6" * 32, step=3))
