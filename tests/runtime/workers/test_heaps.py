"""What a worker keeps once its task is over."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import PartyBundle
from splitonnx.messages import TaskKey
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.workers.pools import WorkerPool
from splitonnx.runtime.workers.processes import WorkerOptions
from splitonnx.runtime.workers.remote_executors import RemoteExecutor
from tests.support.zoo import ZOO

MIB = 1 << 20
KEPT = 4 * MIB
SLACK = 16 * MIB
ROWS = 1 << 20
"""Rows of a large task, whose wires alone are 28 and 24 MiB."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module")
def party() -> PartyBundle:
    bundle = cut(ZOO["chain"].build(), at="act1", tail_at="act3")
    assert bundle.server is not None
    return bundle.server


@contextmanager
def open_pool(party: PartyBundle, *, workers: int, kept_bytes: int) -> Iterator[WorkerPool]:
    options = WorkerOptions(
        party=party,
        threads=1,
        provider="cpu",
        stage_seconds=60.0,
        memory_bytes=None,
        kept_bytes=kept_bytes,
    )
    pool = WorkerPool(options, workers=workers)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
def executor(party: PartyBundle) -> Iterator[RemoteExecutor]:
    with open_pool(party, workers=1, kept_bytes=KEPT) as pool:
        yield pool.open("ana", "a" * 32, None, 0)


def begin(executor: RemoteExecutor, rows: int) -> TaskKey:
    """Run the first stage of a step."""
    key = TaskKey("a" * 32, "train", executor.step, 0)
    executor.begin(key, data={}, seed=0, learning_rate=0.01)
    executor.deliver(key, {"act1@server": np.ones((rows, 7), np.float32)})
    assert [*executor.advance(key)]
    return key


def step(executor: RemoteExecutor, rows: int) -> None:
    key = begin(executor, rows)
    executor.deliver(key, {"act3@client_grad": np.ones((rows, 6), np.float32)})
    assert [*executor.advance(key)]
    executor.finish(key)


def wait_until_tidy() -> None:
    for thread in threading.enumerate():
        if thread.name == "splitonnx-tidy":  # it tells the worker, and hears that it was done
            thread.join()


def measure_worker(executor: RemoteExecutor) -> int:
    """Measure the memory of an executor's worker in bytes, what it shares with its server too."""
    assert executor._worker is not None
    status = Path(f"/proc/{executor._worker.pid}/status").read_text()
    (size,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(size) * 1024


def test_what_a_large_task_took_is_given_back_when_it_is_over(executor: RemoteExecutor) -> None:
    """On earlier versions the worker keeps hundreds of MiB for as long as it lives."""
    step(executor, rows=2)
    before = measure_worker(executor)
    key = begin(executor, ROWS)
    assert measure_worker(executor) > before + KEPT + SLACK
    executor.deliver(key, {"act3@client_grad": np.ones((ROWS, 6), np.float32)})
    assert [*executor.advance(key)]
    executor.finish(key)
    assert measure_worker(executor) < before + KEPT + SLACK


def test_a_worker_keeps_what_all_may_until_there_is_another(party: PartyBundle) -> None:
    """On earlier versions a server's only worker faults in its memory again at every step."""
    with open_pool(party, workers=8, kept_bytes=300 * MIB) as pool:
        ana, bob = (pool.open(name, name[0] * 32, None, 0) for name in ("ana", "bob"))
        step(ana, rows=2)
        before = measure_worker(ana)
        step(ana, ROWS)
        assert measure_worker(ana) > before + 96 * MIB + SLACK
        step(bob, rows=2)
        wait_until_tidy()
        assert measure_worker(ana) < before + 96 * MIB + SLACK


@pytest.mark.parametrize(
    "give_up",
    [
        lambda executor, key: executor.abandon(key),
        lambda executor, key: executor.close(),
        lambda executor, key: executor.restore(executor.party.state(), 0),
    ],
    ids=["abandoned", "closed", "restored"],
)
def test_what_an_open_task_holds_is_given_back_at_once_when_it_is_given_up(
    executor: RemoteExecutor, give_up: Callable[[RemoteExecutor, TaskKey], None]
) -> None:
    """On earlier versions it is there until the next request for that worker comes, if ever."""
    step(executor, rows=2)
    before = measure_worker(executor)
    key = begin(executor, ROWS)
    worker = executor._worker
    assert measure_worker(executor) > before + KEPT + SLACK
    give_up(executor, key)
    executor._worker = worker
    wait_until_tidy()
    assert measure_worker(executor) <= before + KEPT + SLACK
