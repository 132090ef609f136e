"""The example's page under the finger while it trains, on a slow phone: ``make test-browser``.

How soon the taps are answered is measured by ``make taps``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.browsers import cut_digits, tracing
from tests.support.taps import holding_a_phone

pytestmark = pytest.mark.browser

TAPS = 30


def test_taps_are_answered_between_the_tasks_of_a_training(tmp_path: Path) -> None:
    """A tap waits for the task that the page is at, not for the training or for a step of it."""
    with holding_a_phone(cut_digits(tmp_path), is_alone=False) as (screen, finger):
        screen.start(passes=10)
        screen.wait_for_step(5)
        with tracing(finger.devtools) as tasks:
            for tap in range(TAPS):
                finger.tap(tap % 10)
        assert screen.page.inner_text("#drawn") == "Draw a digit first, then tap what it is."
        assert screen.page.inner_text("#start") == "Stop"  # it was training all the time
    assert len(tasks) > TAPS
