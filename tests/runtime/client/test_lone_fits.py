"""One fit of a client at a time, and a folder that is free again after every fit that fails.

``runtime/js/tests/lone_fits.test.ts`` holds the client in JavaScript to the same.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from splitonnx.errors import (
    FolderInUse,
    NotSaved,
    SplitonnxError,
    StageFailed,
    UnfinishedRun,
    UsageError,
)
from splitonnx.folder_locks import FolderLock
from splitonnx.messages import Saved, Unsaved
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import StepRecord
from splitonnx.runtime.engine.executors import Executor
from tests.support import tiny
from tests.support.tiny_servers import TinyServer

DATA = tiny.batch(0)
"""Six samples: three batches of two."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model left whole, which is trained without a server."""
    tiny.local_bundle().client.save(tmp_path / "client")
    return tmp_path / "client"


def open_client(folder: Path, *, resume: bool = False) -> Client:
    return Client(folder, threads=1, resume=resume)


def expect_free(folder: Path) -> None:
    FolderLock.acquire(folder).release()


def break_off(folder: Path) -> None:
    """Leave a run unfinished at step 2."""

    def leave(record: StepRecord) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    with open_client(folder) as client, pytest.raises(KeyboardInterrupt):
        client.fit(DATA, batch_size=2, checkpoint_every=1, on_step=leave)


@pytest.mark.parametrize("number", ["epochs", "batch_size", "checkpoint_every"])
def test_a_number_out_of_its_range_is_refused_before_the_folder_is_held(
    folder: Path, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderLock, "acquire", lambda folder: pytest.fail("it was held"))
    with open_client(folder) as client, pytest.raises(UsageError, match=f"{number} must be"):
        client.fit(DATA, **{"save": True, number: 0})  # type: ignore[arg-type]


def test_where_a_run_is_unfinished_it_can_be_resumed_beside_the_client_that_said_so(
    folder: Path,
) -> None:
    break_off(folder)
    with open_client(folder) as client:
        with pytest.raises(UnfinishedRun):
            client.fit(DATA, batch_size=2, checkpoint_every=1, save=True)
        with open_client(folder, resume=True) as second:
            history = second.fit(DATA, batch_size=2, checkpoint_every=1)
    assert [record.step for record in history.steps] == [2, 3]


def test_a_stage_that_cannot_be_loaded_leaves_the_folder_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(executor: Executor, phase: str) -> None:
        raise StageFailed("train", "no such kernel")

    monkeypatch.setattr(Executor, "prepare", refuse)
    with open_client(folder) as client:
        with pytest.raises(StageFailed):
            client.fit(DATA, save=True)
        expect_free(folder)


def test_a_run_resumed_with_other_batches_leaves_the_folder_free_and_its_place_known(
    folder: Path,
) -> None:
    break_off(folder)
    with open_client(folder, resume=True) as client:
        with pytest.raises(UsageError, match="batch size 2, not 3"):
            client.fit(DATA, batch_size=3, checkpoint_every=1)
        expect_free(folder)
        history = client.fit(DATA, batch_size=2, checkpoint_every=1)
    assert [record.step for record in history.steps] == [2, 3]


def test_what_is_raised_by_a_callback_leaves_the_folder_free(folder: Path) -> None:
    def fail(record: StepRecord) -> None:
        raise ZeroDivisionError

    with open_client(folder) as client:
        with pytest.raises(ZeroDivisionError):
            client.fit(DATA, save=True, on_step=fail)
        expect_free(folder)


def test_an_outcome_that_cannot_be_saved_leaves_the_folder_free(tmp_path: Path) -> None:
    def refuse(answer: Saved) -> Unsaved:
        return Unsaved(session=answer.session, step=answer.step, reason="no room")

    server = TinyServer(bundle=tiny.split_bundle(), saved=refuse)
    server.bundle.client.save(tmp_path / "client")
    with Client(tmp_path / "client", server.dial, give_up_after=0) as client:
        client.step(tiny.batch(1))
        with pytest.raises(NotSaved):
            client.save()
        expect_free(tmp_path / "client")


def test_a_second_fit_or_step_beside_a_fit_is_refused_and_harms_nothing(
    folder: Path,
) -> None:
    with open_client(folder) as alone:
        expected = alone.fit(DATA, batch_size=2, epochs=2)
        state = alone.state()
    refused: list[SplitonnxError] = []

    def fit_again(record: StepRecord) -> None:
        for options in ({}, {"save": True}, {"checkpoint_every": 1, "restart": True}):
            with ThreadPoolExecutor(1) as threads:
                second = threads.submit(client.fit, DATA, batch_size=2, **options)
                refused.append(second.exception())  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="already training"):
            client.fit(DATA)
        with pytest.raises(UsageError, match="already training"):
            client.step(DATA)
        with pytest.raises(FolderInUse):
            FolderLock.acquire(folder)

    with open_client(folder) as client:
        history = client.fit(DATA, batch_size=2, epochs=2, checkpoint_every=2, on_step=fit_again)
        assert [record.loss for record in history.steps] == [r.loss for r in expected.steps]
        for name, array in client.state().items():
            np.testing.assert_array_equal(array, state[name])
        assert {str(error) for error in refused} == {"this client is already training"}
        assert {type(error) for error in refused} == {UsageError}
        assert len(refused) == 3 * 6


def test_a_client_trains_again_once_a_fit_is_over_whether_it_failed_or_not(folder: Path) -> None:
    def fail(record: StepRecord) -> None:
        raise ZeroDivisionError

    with open_client(folder) as client:
        with pytest.raises(ZeroDivisionError):
            client.fit(DATA, batch_size=2, on_step=fail)
        assert len(client.fit(DATA, batch_size=2).steps) == 3
        assert len(client.fit(DATA, batch_size=2).steps) == 3
