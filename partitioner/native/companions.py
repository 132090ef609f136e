"""Do work of several parts at the same time, each with a process for native code of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from typing import TypeVar

from splitonnx.partitioner.native.workers import Isolation, using

R = TypeVar("R")


def run_together(tasks: Sequence[Callable[[], R]]) -> list[R]:
    """Run tasks at the same time, and return their results in the order of the tasks.

    The first runs in this thread.  The others run in threads of their own, with processes of their
    own, which are ended with them.  If several tasks fail, the first one's error is raised.  After
    an error or Ctrl-C here, native code that runs for the others is ended.
    """
    isolations = [Isolation() for _ in tasks[1:]]

    def run(task: Callable[[], R], isolation: Isolation) -> R:
        with using(isolation):
            return task()

    workers = max(1, len(isolations))
    with ThreadPoolExecutor(max_workers=workers) as threads, ExitStack() as undo:
        for isolation in isolations:
            undo.callback(isolation.abandon)
        futures = [
            threads.submit(copy_context().run, run, task, isolation)
            for task, isolation in zip(tasks[1:], isolations, strict=True)
        ]
        results = [task() for task in tasks[:1]]
        results += [future.result() for future in futures]
        undo.pop_all()
        return results
