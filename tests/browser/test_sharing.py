"""The example's page and a Python client train one model together: ``make test-browser``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from splitonnx import Client, Server
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.sharing import list_joined
from tests.support.browsers import DIST, Screen, read_digits
from tests.support.joint_clients import WAIT, noticing_a_share
from tests.support.page_trainings import STEPS, TRAINED

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

AGREEMENT = {"splitfed-v1": 1e-5, "sequential": 3e-3}
"""Between a browser's arithmetic and that of a Python client's ONNX Runtime, by policy.

Averages of two clients damp the differences in rounding; in 90 steps one after the other, each with
the momentum of its own client, they grow by a tenth with each step.
"""
LOCAL_STEPS = 5
WAITING = "Waiting for the other devices"

State = dict[str, np.ndarray]
Expected = dict[str, tuple[State, State]]
"""By policy, the weights of a client with the page's seed, and of another one."""


@contextmanager
def serve_jointly(
    bundle: Path, folder: Path, name: str = "splitfed-v1"
) -> Iterator[tuple[Server, Path]]:
    """Serve a copy of a bundle to two clients, which train one model."""
    own = Path(shutil.copytree(bundle, folder))
    policy = PolicyOptions(name=name, clients_min=2, local_steps=LOCAL_STEPS, round_timeout=60)
    with Server(
        own / "server", port=0, client=own / "client", web=DIST, threads=1, policy=policy
    ) as server:
        yield server, own


def train_in_python(server: Server, bundle: Path, seed: int) -> State:
    """Train one pass through the page's digits, and return the weights that are joined."""
    training, _ = read_digits()
    with Client(bundle / "client", server.url, seed=seed, threads=1, share=True) as client:
        assert len(client.fit(training, batch_size=32).steps) == STEPS
        state = client.state()
        return {name: state[name] for name in list_joined(client.manifest)}


@pytest.fixture(scope="module")
def expected(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What two Python clients train by each policy, the first with the seed of the page."""
    found: Expected = {}
    for name in AGREEMENT:
        folder = tmp_path_factory.mktemp("python") / "bundle"
        with (
            serve_jointly(bundle, folder, name) as (server, own),
            ThreadPoolExecutor(2) as pool,
            noticing_a_share() as sent,
        ):
            first = pool.submit(train_in_python, server, own, 0)
            assert sent.wait(WAIT)
            second = pool.submit(train_in_python, server, own, 1)
            found[name] = first.result(), second.result()
    averaged, handed_on = (found[name][0] for name in AGREEMENT)
    others = [np.abs(averaged[name] - handed_on[name]).max() for name in averaged]
    assert max(others) > 5 * max(AGREEMENT.values())  # the policies' models are told apart
    return found


def open_permitted(screen: Screen) -> None:
    """Permit to share the weights, and wait until the server has heard of it."""
    screen.page.check("#share")
    screen.wait_for_status("Ready")


def assert_joined(
    screen: Screen, other: Future[State], expected: Expected, policy: str = "splitfed-v1"
) -> None:
    """Hold the weights of the page and of the other client against two Python clients' ones."""
    found = screen.read_state(), other.result()
    worst = 0.0
    for state, wanted in zip(found, expected[policy], strict=True):
        for name, array in wanted.items():
            np.testing.assert_allclose(state[name], array, rtol=0, atol=AGREEMENT[policy])
            worst = max(worst, float(np.abs(state[name] - array).max()))
    print(f"\nweights differ from those of two Python clients by {worst:.1e} at the most")
    if policy == "splitfed-v1":
        for name, array in found[1].items():
            np.testing.assert_array_equal(found[0][name], array)  # both end with one model


@pytest.mark.parametrize("policy", AGREEMENT)
def test_a_page_trains_with_others_once_its_user_permits_it(
    bundle: Path, browser: Browser, tmp_path: Path, expected: Expected, policy: str
) -> None:
    with (
        serve_jointly(bundle, tmp_path / "bundle", policy) as (server, own),
        browser.new_context() as context,
        ThreadPoolExecutor(1) as pool,
    ):
        screen = Screen(context.new_page(), server.url)
        screen.wait_for_status("Stopped")
        page = screen.page
        assert not page.is_checked("#share")
        assert page.inner_text("#error-title") == "The server asks for this device's weights"
        told = page.inner_text("#error-text")
        assert f"the server's policy '{policy}' joins what its clients learn" in told
        assert "under Train, permits it" in told
        assert "Never sent: the drawings, their labels, and the weights" in page.inner_text("#kept")
        assert server._registry.policy.report().members == 0

        open_permitted(screen)
        assert "Sent after every 5 steps: the " in page.inner_text("#kept")
        assert page.is_hidden("#error")
        screen.start(passes=1)
        screen.wait_for_status(WAITING)
        assert page.is_disabled("#share")
        assert page.inner_text("#wires").count("weights") == len(expected[policy][0])
        other = pool.submit(train_in_python, server, own, 1)
        screen.wait_for_status(TRAINED)
        assert_joined(screen, other, expected, policy)
        assert screen.problems == []


def test_a_reload_goes_on_with_the_training_of_both(
    bundle: Path, browser: Browser, tmp_path: Path, expected: Expected
) -> None:
    with (
        serve_jointly(bundle, tmp_path / "bundle") as (server, own),
        browser.new_context() as context,
        ThreadPoolExecutor(1) as pool,
    ):
        screen = Screen(context.new_page(), server.url)
        screen.wait_for_status("Stopped")
        open_permitted(screen)
        screen.start(passes=1)
        screen.wait_for_status(WAITING)
        other = pool.submit(train_in_python, server, own, 1)
        for step in (7, 20):
            screen.wait_for_step(step)
            screen.page.reload()
        screen.wait_for_status(TRAINED)
        assert_joined(screen, other, expected)


def test_a_permission_that_is_taken_back_is_gone(
    bundle: Path, browser: Browser, tmp_path: Path
) -> None:
    with (
        serve_jointly(bundle, tmp_path / "bundle") as (server, _),
        browser.new_context() as context,
    ):
        screen = Screen(context.new_page(), server.url)
        screen.wait_for_status("Stopped")
        open_permitted(screen)
        screen.page.uncheck("#share")
        screen.wait_for_status("Stopped")
        screen.page.reload()
        screen.wait_for_status("Stopped")
        assert not screen.page.is_checked("#share")
