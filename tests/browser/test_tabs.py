"""Two tabs with the example's page at one server, in headless Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.browsers import Screen
from tests.support.page_trainings import (
    STEPS,
    TRAINED,
    Training,
    assert_same,
    read_training,
    serve,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


def test_a_second_tab_takes_the_training_over_and_nothing_is_damaged(
    browser: Browser, own: Path, undisturbed: Training
) -> None:
    with serve(own) as server, browser.new_context() as context:
        first = Screen(context.new_page(), server.url)
        first.wait_for_status("Ready")
        first.start(passes=1)
        first.wait_for_step(5)
        second = Screen(context.new_page(), server.url)
        first.wait_for_status("Stopped")
        assert first.page.inner_text("#error-title") == "Another tab trains here"
        second.wait_for_status(TRAINED)
        assert_same(read_training(second), undisturbed)
        first.page.bring_to_front()  # what is behind is not drawn
        first.page.click("#retry")
        first.wait_for_step(STEPS)
        first.wait_for_status(TRAINED)
        assert [*first.problems, *second.problems] == []
