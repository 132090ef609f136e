"""A state becomes the outcome of training, or says why it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import BundleError, NotSaved, StateNotFinite
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.engine.outcomes import check_outcome, publish_state
from tests.support import tiny


def load(folder: Path) -> Bundle:
    tiny.local_bundle().save(folder)
    return Bundle.load(folder)


def test_an_outcome_is_read_again_as_it_was_published(tmp_path: Path) -> None:
    client = load(tmp_path / "bundle").client
    state = {name: array + 1 for name, array in client.state().items()}
    publish_state(client, state, step=3, session="a" * 32, position="", owner="me")
    found = Bundle.load(tmp_path / "bundle").client
    assert (found.step, found.session, found.owner) == (3, "a" * 32, "me")
    for name, array in found.state().items():
        np.testing.assert_array_equal(array, state[name])


def test_a_bundle_in_memory_cannot_be_published_in_place() -> None:
    bundle = tiny.local_bundle()
    with pytest.raises(BundleError, match="no folder"):
        check_outcome(bundle.client, bundle.client.state())
    with pytest.raises(BundleError, match="no folder"):
        Executor(bundle.client, Engine(threads=1)).publish()


def test_a_state_that_is_not_finite_is_not_published(tmp_path: Path) -> None:
    client = load(tmp_path / "bundle").client
    state = {name: np.full_like(array, np.nan) for name, array in client.state().items()}
    with pytest.raises(StateNotFinite):
        publish_state(client, state, step=1, session="", position="", owner="")
    assert Bundle.load(tmp_path / "bundle").client.step == 0


def test_a_folder_that_is_gone_is_not_written_to(tmp_path: Path) -> None:
    client = load(tmp_path / "bundle").client
    (tmp_path / "bundle").rename(tmp_path / "other")
    with pytest.raises(NotSaved):
        check_outcome(client, client.state())
