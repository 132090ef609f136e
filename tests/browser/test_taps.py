"""The example's page under the finger while it trains, on a slow phone: ``make test-browser``.

How soon the taps are answered is measured by ``make taps``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import UNOPTIMIZED
from tests.support.browsers import launching_chromium, tracing
from tests.support.taps import opening_a_phone

if TYPE_CHECKING:
    from playwright.sync_api import Playwright

pytestmark = pytest.mark.browser

TAPS = 30


def test_taps_are_answered_between_the_tasks_of_a_training(
    playwright: Playwright, own: Path
) -> None:
    """A tap waits for the task that the page is at, not for the training or for a step of it."""
    with (
        launching_chromium(playwright, UNOPTIMIZED) as browser,  # with no other page to be traced
        opening_a_phone(own, browser) as (screen, finger),
    ):
        screen.start(passes=10)
        screen.wait_for_step(5)
        with tracing(finger.devtools) as tasks:
            for tap in range(TAPS):
                finger.tap(tap % 10)
        assert screen.page.inner_text("#drawn") == "Draw a digit first, then tap what it is."
        assert screen.page.inner_text("#start") == "Stop"  # it was training all the time
    assert len(tasks) > TAPS
