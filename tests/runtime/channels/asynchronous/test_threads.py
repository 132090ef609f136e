"""A thread beside a loop: the loop goes on, and waits for what was begun, also when cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from functools import partial

import pytest

from splitonnx.runtime.channels.asynchronous.threads import WorkThread
from tests.support.echoes import PATIENCE

NAME = contextvars.ContextVar("NAME", default="nobody")


def test_functions_run_in_one_thread_one_after_the_other_while_the_loop_goes_on() -> None:
    async def work() -> None:
        thread, may_end = WorkThread(), threading.Event()
        NAME.set("ana")
        first = asyncio.create_task(thread.run(may_end.wait, PATIENCE))
        second = asyncio.create_task(thread.run(threading.current_thread))
        named = asyncio.create_task(thread.run(NAME.get))
        await asyncio.sleep(0)  # they have begun, and the loop is free
        may_end.set()
        assert await first
        assert await second is await thread.run(threading.current_thread)
        assert await second is not threading.current_thread()
        assert await named == "ana"
        thread.close()
        assert not (await second).is_alive()
        assert await thread.run(threading.current_thread) is not await second
        thread.close()
        thread.close()

    asyncio.run(work())


def test_errors_are_those_of_the_function() -> None:
    async def work() -> None:
        thread = WorkThread()
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 / 0)
        assert await thread.run(int, "7") == 7
        thread.close()

    asyncio.run(work())


@pytest.mark.parametrize("fails", [False, True])
def test_who_is_cancelled_waits_for_the_end_however_often(fails: bool) -> None:
    runs, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        runs.set()
        assert may_end.wait(PATIENCE)
        ended.set()
        if fails:
            raise ValueError("nobody hears it")

    async def cancel() -> None:
        asked: list[str] = []
        thread = WorkThread(partial(asked.append, "end sooner"))
        task = asyncio.create_task(thread.run(work))
        while not runs.is_set():
            await asyncio.sleep(0)
        for _ in range(3):
            task.cancel()
            for _ in range(3):
                await asyncio.sleep(0)
            assert not task.done()
        assert asked == ["end sooner"]
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()
        thread.close()

    asyncio.run(cancel())
