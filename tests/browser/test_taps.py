"""The example's page under the finger while it trains, on a slow phone: ``make test-browser``.

It has a module of its own, as its Chromium is to start when a core is spared.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.support.browsers import cut_digits, tracing
from tests.support.taps import TIMELY, count_late, holding_a_phone

pytestmark = pytest.mark.browser

TAPS = 60


def test_taps_are_answered_while_a_slow_phone_trains(tmp_path: Path) -> None:
    with holding_a_phone(cut_digits(tmp_path)) as (screen, finger):
        screen.start(passes=10)
        screen.wait_for_step(5)
        with tracing(finger.devtools) as tasks:
            for tap in range(TAPS):
                finger.tap(tap % 10)
        assert screen.page.inner_text("#drawn") == "Draw a digit first, then tap what it is."
        assert screen.page.inner_text("#start") == "Stop"  # it was training all the time
        answered = finger.durations()
    late = count_late(answered)
    print(
        f"\ntaps: median {statistics.median(answered):.0f} ms, longest {max(answered):.0f} ms, "
        f"{late} of {TAPS} over {TIMELY:.0f} ms; the page's longest task: {max(tasks):.0f} ms"
    )
    # Now and then a shared machine has something else to do: `make taps` looks closer.
    assert late <= TAPS // 10
    # In processor time a tap waits for one task, and is answered in the next.
    assert len(tasks) > TAPS
    assert statistics.quantiles(tasks, n=100)[-1] <= TIMELY / 2
    assert max(tasks) <= TIMELY
