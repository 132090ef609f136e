"""What a server reports becomes the error that it raised."""

from __future__ import annotations

import pytest

from splitonnx.errors import (
    BatchTooLarge,
    NotFinite,
    NotPermitted,
    RemoteFault,
    ServerBusy,
    SplitonnxError,
    StaleConnection,
    TaskTooLarge,
)
from splitonnx.messages import Fault
from splitonnx.runtime.channels.faults import translate_fault


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
