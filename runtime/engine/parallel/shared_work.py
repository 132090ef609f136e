"""Have several threads of Python share pieces of work that release the interpreter's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from splitonnx.runtime.engine.denormals import flushing_denormals

_Piece = TypeVar("_Piece")


def share_work(
    pieces: Sequence[_Piece],
    compute: Callable[[Iterator[_Piece]], None],
    *,
    threads: int,
    name: str,
    stop: Callable[[], None] = lambda: None,
) -> None:
    """Have at most ``threads`` threads take the next piece again and again, until none is left.

    Each thread, of which the caller's is one, calls ``compute`` with what gives it the pieces; the
    others are called ``name``.  If one fails, no thread takes another piece, ``stop`` is called,
    and what was raised first is raised here when all have ended; Ctrl-C before any other.
    """
    left = iter(pieces)  # taking the next one is atomic
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with flushing_denormals():
                compute(left)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)
            stop()
            _exhaust(left)

    others = [
        threading.Thread(target=work, name=name, daemon=True)
        for _ in range(min(threads, len(pieces)) - 1)
    ]
    started: list[threading.Thread] = []
    try:
        with suppress(RuntimeError):  # no more threads: those that are there do all the work
            for thread in others:
                thread.start()
                started.append(thread)
        work()
    finally:  # Ctrl-C comes here, too
        _exhaust(left)
        for thread in started:
            thread.join()
    if failures:
        raise next((e for e in failures if not isinstance(e, Exception)), failures[0])


def _exhaust(pieces: Iterator[_Piece]) -> None:
    for _ in pieces:
        pass
