"""The example's page in headless Chromium, against a real server: ``make test-browser``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

import numpy as np
import pytest

from splitonnx import Client, Server
from splitonnx.runtime.edge.tokens import Tokens, add_token
from tests.support.browsers import DIST, Relay, Screen, read_digits
from tests.support.page_trainings import (
    STEPS,
    TRAINED,
    TrainedPage,
    Training,
    assert_same,
    read_training,
    serve,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

AGREEMENT = 1e-3
"""Between a browser's arithmetic and that of a Python client's ONNX Runtime."""


def count_steps(server: Server) -> int:
    """Give how many training steps the server has computed."""
    with urlopen(f"{server.url.replace('ws', 'http', 1)}/metrics") as answer:
        found = re.search(
            r'^splitonnx_steps_total{phase="train"} (\S+)', answer.read().decode(), re.M
        )
    assert found
    return int(float(found[1]))


def test_the_page_trains_as_a_python_client_does(own: Path, undisturbed: Training) -> None:
    training, _ = read_digits()
    with serve(own) as server, Client(own / "client", server.url) as client:
        history = client.fit(training, batch_size=32)
        state = client.state()
    assert list(undisturbed.losses) == [record.step for record in history.steps]
    assert len(history.steps) == STEPS
    losses = [record.loss for record in history.steps]
    difference = np.abs(np.array(list(undisturbed.losses.values())) - losses).max()
    print(f"\nlosses differ by {difference:.1e} at the most")
    assert difference < AGREEMENT
    assert losses[-1] < losses[0] / 4
    assert undisturbed.state.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_allclose(undisturbed.state[name], array, rtol=0, atol=AGREEMENT)
    worst = max(np.abs(undisturbed.state[name] - array).max() for name, array in state.items())
    print(f"weights differ by {worst:.1e} at the most")


def test_a_reload_goes_on_at_the_very_step(
    own: Path, browser: Browser, undisturbed: Training
) -> None:
    with serve(own) as server, browser.new_context() as context:
        screen = Screen(context.new_page(), server.url)
        screen.wait_for_status("Ready")
        screen.start(passes=1)
        for step in (5, 20):
            screen.wait_for_step(step)
            screen.page.reload()
        screen.wait_for_status(TRAINED)
        assert_same(read_training(screen), undisturbed)
        # A page that is gone has no messages to send again: what the server made of a step that
        # the page had not written down is given up, and made once more, the same to the bit.
        assert STEPS <= count_steps(server) <= STEPS + 2


def test_a_reload_just_after_the_end_trains_nothing_again(trained: TrainedPage) -> None:
    screen = trained.screen
    assert count_steps(trained.server) == STEPS
    screen.page.evaluate(
        """async () => {
          const open = indexedDB.open("splitonnx-page");
          await new Promise((resolve) => { open.onsuccess = resolve; });
          const writing = open.result.transaction("head", "readwrite");
          const plan = { epochs: 1, batchSize: 32, drawings: 0 };
          const traffic = { up: 1, down: 1 };
          writing.objectStore("head").put({ course: { plan, start: 0 }, traffic }, "head");
          await new Promise((resolve) => { writing.oncomplete = resolve; });
          open.result.close();
        }"""
    )
    screen.page.reload()
    screen.wait_for_status(TRAINED)
    assert screen.page.inner_text("#steps") == str(STEPS)
    assert count_steps(trained.server) == STEPS


def test_a_lost_connection_costs_no_step(
    own: Path, browser: Browser, undisturbed: Training
) -> None:
    with (
        serve(own) as server,
        Relay(server.port) as relay,
        browser.new_context() as context,
    ):
        screen = Screen(context.new_page(), relay.url)
        screen.wait_for_status("Ready")
        screen.start(passes=1)
        for step in (5, 20):
            screen.wait_for_step(step)
            relay.cut()
        screen.wait_for_status(TRAINED)
        assert_same(read_training(screen), undisturbed)
        assert count_steps(server) == STEPS


def test_a_server_that_starts_anew_is_gone_on_with(
    own: Path, browser: Browser, undisturbed: Training
) -> None:
    with browser.new_context() as context:
        with serve(own) as server:
            screen = Screen(context.new_page(), server.url)
            screen.wait_for_status("Ready")
            screen.start(passes=1)
            screen.wait_for_step(1)
        screen.wait_for_status("Connection lost")
        with serve(own, port=server.port, resume=True):
            screen.wait_for_status(TRAINED)
            assert_same(read_training(screen), undisturbed)


def test_what_is_drawn_is_recognised_and_trained_on(own: Path, browser: Browser) -> None:
    with serve(own) as server, browser.new_context() as context:
        screen = Screen(context.new_page(), server.url)
        screen.wait_for_status("Ready")
        for _ in range(3):
            screen.draw((0.3, 0.2), (0.72, 0.2), (0.45, 0.85))
            screen.page.get_by_label("It is a 7").click()
        assert "3 drawings of yours" in screen.page.inner_text("#drawn")
        screen.start(passes=3)
        screen.wait_for_status(TRAINED)
        held_out = float(screen.page.inner_text("#accuracy").removesuffix(" %"))
        assert held_out > 90
        screen.draw((0.3, 0.2), (0.72, 0.2), (0.45, 0.85))
        screen.page.get_by_text("It looks like a 7").wait_for()
        assert "24 maps of 8" in screen.page.inner_text("#activation-text")
        assert screen.page.inner_text("#up").endswith("MB")
        screen.page.on("dialog", lambda dialog: dialog.accept())
        screen.page.get_by_text("Forget the training").click()
        screen.page.locator("#steps").get_by_text("0", exact=True).wait_for()
        screen.wait_for_status(re.compile("^Ready$"))
        assert screen.read_storage() == {}
        assert "3 drawings of yours" in screen.page.inner_text("#drawn")
        assert screen.problems == []


def test_the_token_stands_in_the_page_s_address(
    own: Path, browser: Browser, tmp_path: Path
) -> None:
    token = add_token(tmp_path / "tokens", "ana")
    tokens = Tokens.read(tmp_path / "tokens")
    with (
        Server(own / "server", port=0, client=own / "client", web=DIST, tokens=tokens) as server,
        browser.new_context() as context,
    ):
        screen = Screen(context.new_page(), server.url)
        screen.wait_for_status("Stopped")
        assert screen.page.inner_text("#error-title") == "The server wants a token"
        screen = Screen(context.new_page(), f"{server.url}/#token={token}")
        screen.start(passes=1)
        screen.wait_for_step(1)
