"""The example's page in headless Chromium, against a server that lies to it: ``make test-browser``.

Whatever the lie, the page says what is wrong and stops, keeps nothing of it, and goes on with the
server once that is honest.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from splitonnx import Server
from splitonnx.bundles import PartyBundle
from tests.support.browsers import DIST, Screen
from tests.support.lying_servers import LyingServer
from tests.support.page_lies import (
    ANSWERS,
    BEGUN,
    FILES,
    GRAPHS,
    GREETINGS,
    LATER,
    MIB,
    NO_FRAME,
    Complaint,
    in_greeting,
    in_step,
)
from tests.support.page_trainings import TRAINED, Training, assert_same_state

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

ENOUGH = 128 * MIB
"""Bytes of an endless file by which the page has left off for certain.

64 MiB of header is the most that it reads; Linux may hold 36 MiB more on their way to it.
"""


@pytest.fixture(scope="module")
def part(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> PartyBundle:
    """The client's part of a copy; the server's lies beside it."""
    own = shutil.copytree(bundle, tmp_path_factory.mktemp("hostile") / "bundle")
    return PartyBundle.load(Path(own) / "client")


@pytest.fixture(scope="module")
def honest(part: PartyBundle) -> Iterator[Server]:
    assert part.path is not None
    folder = part.path.parent / "server"
    with Server(folder, port=0, threads=1, client=part, web=DIST) as server:
        yield server


@pytest.fixture(scope="module")
def ports() -> set[int]:
    """The ports that the window has been at."""
    return set()


@pytest.fixture
def liar(honest: Server, ports: set[int]) -> Iterator[LyingServer]:
    """A server at a port of its own, where the window was never and keeps nothing."""
    liar = LyingServer(honest.port)
    while liar.server_address[1] in ports:
        liar.server_close()
        liar = LyingServer(honest.port)
    ports.add(liar.server_address[1])
    with liar as server:
        yield server


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    """One window for all lies, since a new one starts several processes."""
    with browser.new_context() as context:
        yield context.new_page()


def train(page: Page, liar: LyingServer) -> Screen:
    screen = Screen(page, liar.url)
    screen.wait_for_status("Ready")
    screen.start(passes=1)
    return screen


def expect_complaint(screen: Screen, complaint: Complaint) -> None:
    """Wait until the page stops, and see that it says why."""
    screen.wait_for_status("Stopped")
    text = screen.page.inner_text("#error-text")
    assert screen.page.inner_text("#error-title") == complaint.title, text
    assert re.search(complaint.text, text), text
    assert len(text) < 500
    assert screen.page.locator("#error").is_visible()


def expect_nothing_kept(screen: Screen) -> None:
    assert screen.read_storage() == {}
    assert screen.losses() == {}


def expect_use(screen: Screen, liar: LyingServer) -> None:
    """See that one tap makes the page well again, once the server is honest."""
    liar.be_honest()
    screen.page.get_by_text("Try again").click()
    screen.wait_for_status(re.compile("^Ready$"))
    assert screen.page.locator("#error").is_hidden()
    assert screen.problems == []


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_refused_and_nothing_is_stored(
    name: str, part: PartyBundle, liar: LyingServer, page: Page
) -> None:
    make, complaint = GRAPHS[name]
    liar.files = make(part)
    screen = train(page, liar)
    expect_complaint(screen, complaint)
    expect_nothing_kept(screen)
    expect_use(screen, liar)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused_and_nothing_is_stored(
    name: str, part: PartyBundle, liar: LyingServer, page: Page
) -> None:
    file, make, complaint = FILES[name]
    lie = make(part)
    liar.files = lie if isinstance(lie, dict) else {f"/client/{file}": lie}
    screen = Screen(page, liar.url)
    expect_complaint(screen, complaint)
    expect_nothing_kept(screen)
    assert liar.poured < ENOUGH
    expect_use(screen, liar)


@pytest.mark.parametrize("name", GREETINGS)
def test_a_greeting_is_refused_and_nothing_is_stored(
    name: str, liar: LyingServer, page: Page
) -> None:
    lie, complaint = GREETINGS[name]
    liar.tell = in_greeting(lie)
    screen = Screen(page, liar.url)
    expect_complaint(screen, complaint)
    expect_nothing_kept(screen)
    expect_use(screen, liar)


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_refused_and_nothing_is_stored(
    name: str, liar: LyingServer, page: Page
) -> None:
    lie, complaint = ANSWERS[name]
    liar.tell = in_step(lie)
    screen = train(page, liar)
    expect_complaint(screen, complaint)
    expect_nothing_kept(screen)
    expect_use(screen, liar)


@pytest.mark.parametrize("name", LATER)
def test_a_training_goes_on_after_a_lie(name: str, liar: LyingServer, page: Page) -> None:
    liar.tell, complaint = LATER[name]
    screen = train(page, liar)
    expect_complaint(screen, complaint)
    assert list_steps(screen) == {BEGUN - 1, BEGUN}
    liar.be_honest()
    page.get_by_text("Try again").click()
    screen.wait_for_step(BEGUN + 2)


def test_a_frame_that_is_none_is_a_lost_connection(liar: LyingServer, page: Page) -> None:
    liar.tell = NO_FRAME
    screen = train(page, liar)
    screen.wait_for_status("Connection lost, trying again")
    assert list_steps(screen) == {BEGUN - 1, BEGUN}
    liar.be_honest()
    screen.wait_for_step(BEGUN + 2)


def test_the_weights_are_those_of_a_training_without_a_lie(
    liar: LyingServer, page: Page, undisturbed: Training
) -> None:
    liar.tell, complaint = LATER["a gradient of another shape"]
    screen = train(page, liar)
    expect_complaint(screen, complaint)
    liar.be_honest()
    page.reload()
    screen.wait_for_status(TRAINED)
    assert_same_state(screen.read_state(), undisturbed.state)


def list_steps(screen: Screen) -> set[int]:
    """List the steps that the page has checkpoints of."""
    return {int(name.rpartition("/")[2]) for name in screen.read_storage()}
