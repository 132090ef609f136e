"""What the tests in Chromium share: one browser, one cut bundle, and one training undisturbed.

Each test opens a context of its own, which is a browser that was never here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.browsers import cut_digits, launching_chromium
from tests.support.page_trainings import TrainedPage, Training, training_a_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright

UNOPTIMIZED = "--js-flags=--liftoff-only"
"""V8 would optimize ONNX Runtime anew for each window, which costs more than its training does."""


@pytest.fixture(scope="session")
def playwright() -> Iterator[Playwright]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="session")
def browser(playwright: Playwright) -> Iterator[Browser]:
    with launching_chromium(playwright, UNOPTIMIZED) as chromium:
        yield chromium


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's model, which no test changes."""
    return cut_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def own(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, which a test may train."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def trained(
    bundle: Path, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TrainedPage]:
    """A page that has trained where nothing went wrong, and is still open."""
    with training_a_page(bundle, tmp_path_factory.mktemp("undisturbed"), browser) as page:
        yield page


@pytest.fixture(scope="session")
def undisturbed(trained: TrainedPage) -> Training:
    """What the page trains where nothing goes wrong."""
    return trained.training
