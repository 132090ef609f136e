"""Threads share pieces of work, and what one of them raises reaches the caller."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from splitonnx.runtime.engine.parallel.shared_work import share_work


def test_each_piece_is_taken_once_whoever_takes_it() -> None:
    taken: list[int] = []
    together = threading.Barrier(3)

    def compute(left: Iterator[int]) -> None:
        together.wait(10)  # three threads are there
        for piece in left:
            taken.append(piece)

    share_work(range(50), compute, threads=3, name="helpers")
    assert sorted(taken) == list(range(50))
    assert not [thread for thread in threading.enumerate() if thread.name == "helpers"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_failure_ends_the_work_and_is_raised(kind: type[BaseException]) -> None:
    stopped: list[bool] = []

    def compute(left: Iterator[int]) -> None:
        raise kind(f"at {next(left)}")

    with pytest.raises(kind, match="at 0"):
        share_work(range(50), compute, threads=1, name="helpers", stop=lambda: stopped.append(True))
    assert stopped == [True]


def test_ctrl_c_is_raised_also_where_another_thread_failed_before() -> None:
    both = threading.Barrier(2)

    def compute(left: Iterator[int]) -> None:
        is_caller = threading.current_thread() is threading.main_thread()
        both.wait(10)
        raise KeyboardInterrupt if is_caller else ValueError

    with pytest.raises(KeyboardInterrupt):
        share_work(range(50), compute, threads=2, name="helpers")
