"""What an exchange wants done and tells: plain values, of which large parts are not printed."""

from __future__ import annotations

import numpy as np

from splitonnx.messages import TaskKey
from splitonnx.runtime.channels.exchange_events import Connect, HangUp, Replied, Transmit


def test_events_compare_by_what_they_say() -> None:
    effects: list[object] = [Connect(), HangUp()]
    assert effects == [Connect(), HangUp()]
    assert effects != [HangUp(), Connect()]


def test_tensors_are_not_printed() -> None:
    wires = {"h": np.arange(1000)}
    shown = repr(Replied(TaskKey("5" * 32, "train", 3, 0), wires))
    assert "train" in shown
    assert "h" not in shown.split("micro_batch")[1]
    assert "chunk" not in repr(Transmit([b"x" * 1000]))
