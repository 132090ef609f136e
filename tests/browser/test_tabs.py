"""Two tabs with the example's page at one server, in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from splitonnx import Server
from tests.support.browsers import DIST, Screen, cut_digits, running_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

TRAINED = "Trained, and ready"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as chromium:
        yield chromium


def serve(bundle: Path) -> Server:
    return Server(bundle / "server", port=0, client=bundle / "client", web=DIST)


def test_a_second_tab_takes_the_training_over_and_nothing_is_damaged(
    browser: Browser, tmp_path: Path
) -> None:
    one = cut_digits(tmp_path)
    two = Path(shutil.copytree(one, tmp_path / "two"))
    with serve(one) as server, browser.new_context() as context:
        alone = Screen(context.new_page(), server.url)
        alone.wait_for_status("Ready")
        alone.start(passes=1)
        alone.wait_for_status(TRAINED)
        losses, state = alone.losses(), alone.read_state()
    with serve(two) as server, browser.new_context() as context:
        first = Screen(context.new_page(), server.url)
        first.wait_for_status("Ready")
        first.start(passes=1)
        first.wait_for_step(5)
        second = Screen(context.new_page(), server.url)
        first.wait_for_status("Stopped")
        assert first.page.inner_text("#error-title") == "Another tab trains here"
        second.wait_for_status(TRAINED)
        assert second.losses() == losses
        kept = second.read_state()
        assert kept.keys() == state.keys()
        for name, array in state.items():
            np.testing.assert_array_equal(kept[name], array)
        first.page.bring_to_front()  # what is behind is not drawn
        first.page.click("#retry")
        first.wait_for_step(len(losses))
        first.wait_for_status(TRAINED)
        assert [*first.problems, *second.problems] == []
