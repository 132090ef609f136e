"""One pass of the example's page through its digits: what it gives, and a page that has made it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from splitonnx import Server
from tests.support.browsers import DIST, Screen

if TYPE_CHECKING:
    from playwright.sync_api import Browser

STEPS = 45
"""Of one pass through 1,437 digits, 32 a step."""
TRAINED = "Trained, and ready"


@dataclass(frozen=True, kw_only=True)
class Training:
    """One pass: the loss of each step, and the device's weights afterwards."""

    losses: dict[int, float]
    state: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class TrainedPage:
    """A page that has made one pass, still open at its server, and what came of the pass."""

    server: Server
    screen: Screen
    training: Training


def serve(bundle: Path, *, port: int = 0, resume: bool = False) -> Server:
    """Serve a bundle and the page; one thread does for a model this small."""
    return Server(
        bundle / "server",
        port=port,
        client=bundle / "client",
        web=DIST,
        resume=resume,
        threads=1,
    )


@contextmanager
def training_a_page(bundle: Path, folder: Path, browser: Browser) -> Iterator[TrainedPage]:
    """Train a page where nothing goes wrong, on a copy of the bundle in a folder."""
    own = Path(shutil.copytree(bundle, folder / "bundle"))
    with serve(own) as server, browser.new_context() as context:
        screen = Screen(context.new_page(), server.url)
        screen.wait_for_status("Ready")
        screen.start(passes=1)
        screen.wait_for_status(TRAINED)
        assert screen.problems == []
        yield TrainedPage(server=server, screen=screen, training=read_training(screen))


def read_training(screen: Screen) -> Training:
    """Read what a page's training came to."""
    return Training(losses=screen.losses(), state=screen.read_state())


def assert_same(actual: Training, expected: Training) -> None:
    """Hold two trainings in the browser against each other: equal to the bit."""
    assert actual.losses == expected.losses
    assert_same_state(actual.state, expected.state)


def assert_same_state(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Hold the weights of two trainings against each other: equal to the bit."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)
