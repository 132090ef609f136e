"""Pauses of the garbage collector: it is off as long as any is open, and then as it was."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from splitonnx.partitioner.graphs.pauses import pause_collection


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """Have the collector on before each test, and as it was after it."""
    was_on = gc.isenabled()
    gc.enable()
    yield
    if was_on:
        gc.enable()
    else:
        gc.disable()


def test_the_collector_is_off_inside_and_on_behind() -> None:
    with pause_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_inner_pause_does_not_end_the_outer_one() -> None:
    with pause_collection():
        with pause_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with pause_collection():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_an_error_ends_the_pause() -> None:
    with pytest.raises(ValueError, match="odd"), pause_collection():
        raise ValueError("odd")
    assert gc.isenabled()


def test_the_last_of_two_threads_ends_the_pause() -> None:
    entered, may_leave = threading.Event(), threading.Event()

    def work() -> None:
        with pause_collection():
            entered.set()
            may_leave.wait(60)

    thread = threading.Thread(target=work)
    with pause_collection():
        thread.start()
        assert entered.wait(60)
    assert not gc.isenabled()  # the other thread still works
    may_leave.set()
    thread.join(60)
    assert not thread.is_alive()
    assert gc.isenabled()
