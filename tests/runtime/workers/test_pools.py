"""The workers of a server: who has one, who gets one next, and what their ends count."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import RemoteFault, ServerBusy
from splitonnx.messages import TaskKey
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import StepRecord
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.scheduling import places
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.workers import pools
from splitonnx.runtime.workers.messages import Action, Done, Fetch, Work, write_frame
from splitonnx.runtime.workers.pools import MAX_REMEMBERED, WorkerPool
from splitonnx.runtime.workers.processes import Worker, WorkerOptions
from splitonnx.runtime.workers.remote_executors import RemoteExecutor
from tests.support import tiny
from tests.support.clinics import (
    DATA,
    OWNERS,
    check_equal,
    make_options,
    open_clinic,
    train_in_process,
)
from tests.support.zoo import ZOO


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> dict[str, np.ndarray]:
    """What training comes to in the server's own process."""
    return train_in_process(bundle)


@contextmanager
def ending_workers_over(step: int) -> Iterator[None]:
    """Let every worker that is told to work on a step end before it is at it."""
    exchange = Worker._exchange

    def exchange_and_end(worker: Worker, action: Action, tensors: Any) -> Any:
        if not isinstance(action, Work) or action.key.step != step:
            return exchange(worker, action, tensors)
        os.kill(worker.pid, signal.SIGSTOP)  # it reads nothing until it ends

        def write_and_end(pipe: Any, message: Any) -> None:
            write_frame(pipe, message)
            os.kill(worker.pid, signal.SIGKILL)

        with patch("splitonnx.runtime.workers.processes.write_frame", write_and_end):
            return exchange(worker, action, tensors)

    with patch.object(Worker, "_exchange", exchange_and_end):
        yield


def test_a_step_that_ends_its_worker_twice_is_not_tried_a_third_time(
    bundle: Bundle, tmp_path: Path
) -> None:
    with open_clinic(bundle.server, tmp_path) as clinic:
        with (
            Client(
                bundle.client, clinic.server.url, credentials=clinic.credentials("ana")
            ) as client,
            pytest.raises(RemoteFault, match=r"WorkerLost: .* again at the same step .*SIGKILL"),
            ending_workers_over(step=2),
        ):
            client.fit(DATA, batch_size=8)
        with Client(
            bundle.client, clinic.server.url, credentials=clinic.credentials("ana")
        ) as client:
            client.step({name: array[:8] for name, array in DATA.items()})
        assert clinic.count_deaths() == 2


def test_a_worker_that_ends_between_two_steps_is_held_against_neither(
    bundle: Bundle, tmp_path: Path, expected: dict[str, np.ndarray]
) -> None:
    with open_clinic(bundle.server, tmp_path) as clinic:
        kills = 3

        def on_step(record: StepRecord) -> None:
            nonlocal kills
            if record.step == 2 and kills:
                kills -= 1
                clinic.end_worker("ana", 2, signal.SIGKILL)

        with Client(
            bundle.client, clinic.server.url, credentials=clinic.credentials("ana")
        ) as client:
            client.fit(DATA, batch_size=8, on_step=on_step)
            check_equal(client.state(), expected)
        assert clinic.count_deaths() == 3


def test_owners_share_a_worker_in_turns_and_none_is_lost(
    bundle: Bundle, expected: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On earlier versions who comes second is refused as long as the first is there."""
    monkeypatch.setattr(places, "TENURE_SECONDS", 0.0)
    batches = [{n: array[i : i + 8] for n, array in DATA.items()} for i in range(0, 48, 8)]
    with open_clinic(bundle.server, tmp_path, Limits(workers=1)) as clinic, ExitStack() as stack:
        clients = [
            stack.enter_context(
                Client(bundle.client, clinic.server.url, credentials=clinic.credentials(owner))
            )
            for owner in OWNERS
        ]
        pids = []
        for batch in batches:
            for owner, client in zip(OWNERS, clients, strict=True):
                client.step(batch)
                pids.append(clinic.worker(owner).pid)
        states = [client.state() for client in clients]
        assert clinic.count_deaths() == 0
    assert len(set(pids)) == len(pids)
    for name, array in states[0].items():
        np.testing.assert_array_equal(states[1][name], array)


def test_more_clients_than_workers_train_at_once_and_come_to_the_same(
    bundle: Bundle, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "TENURE_SECONDS", 0.0)
    ended: list[dict[str, np.ndarray]] = []

    def train(url: str) -> None:
        with Client(bundle.client, url) as client:
            client.fit(DATA, batch_size=8)
            ended.append(client.state())

    assert bundle.server is not None
    limits = Limits(workers=2)
    with Server(bundle.server, port=0, isolate=True, limits=limits, threads=1) as server:
        threads = [threading.Thread(target=train, args=(server.url,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(ended) == len(threads)
    for state in ended:
        check_equal(state, expected)


def test_greetings_take_no_worker(bundle: Bundle) -> None:
    """On earlier versions sixteen of them take them all."""
    limits = Limits(workers=1)
    with (
        Server(bundle.server, port=0, isolate=True, limits=limits) as server,  # type: ignore[arg-type]
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(Client(bundle.client, server.url)) for _ in range(4)]
        clients[-1].step({name: array[:8] for name, array in DATA.items()})


def test_an_open_task_keeps_its_worker(bundle: Bundle) -> None:
    assert bundle.server is not None
    pool = WorkerPool(make_options(bundle.server), workers=1)
    try:
        first, second = (pool.open("", name * 32, None, 0) for name in "ab")
        key = TaskKey("a" * 32, "train", 0, 0)
        begin(first, key)
        with pytest.raises(ServerBusy, match="1 workers"):
            begin(second, TaskKey("b" * 32, "train", 0, 0))
        first.abandon(key)
        second.abandon(TaskKey("b" * 32, "train", 0, 0))
        begin(second, TaskKey("b" * 32, "train", 0, 0))
        assert not first.is_lost
    finally:
        pool.close()


def begin(executor: RemoteExecutor, key: TaskKey) -> None:
    executor.begin(key, data={}, seed=0, learning_rate=0.1)
    executor.deliver(key, {"act1@server": np.ones((2, 7), np.float32)})
    assert [*executor.advance(key)]


def test_a_worker_that_cannot_start_is_told_in_the_log_and_the_step_is_tried_twice(
    bundle: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On earlier versions the client is told to look into a module of the server's."""
    with open_clinic(bundle.server, tmp_path) as clinic:
        monkeypatch.setattr(sys, "executable", "false")
        with (
            Client(
                bundle.client, clinic.server.url, credentials=clinic.credentials("ana")
            ) as client,
            pytest.raises(RemoteFault, match=r"WorkerLost: no worker can be started .*--resume"),
        ):
            client.step({name: array[:8] for name, array in DATA.items()})
        assert clinic.count_deaths() == 2
    reasons = [r.message for r in caplog.records if "can be started: " in r.message]
    assert len(reasons) == 2
    assert "it ended with exit code 1" in reasons[0]


# --- with workers that compute nothing --------------------------------------------------------


class Idle:
    """A worker that does what it is told and computes nothing."""

    started: list[Idle]

    def __init__(self, options: WorkerOptions, kept_bytes: Callable[[], int]) -> None:
        self.is_alive = True
        self.kept_bytes = kept_bytes
        self.tidied = 0
        self.started.append(self)

    def ask(self, action: Action, tensors: object = None) -> dict[str, np.ndarray] | Done:
        return {} if isinstance(action, Fetch) else Done(is_finished=True)

    def abandon(self, session: int, key: TaskKey) -> None:
        pass

    def forget(self, session: int) -> None:
        pass

    def tidy(self) -> None:
        self.tidied += 1

    def interrupt(self) -> None:
        pass

    def end(self) -> None:
        self.is_alive = False


class Ward:
    """A pool of idle workers, under a clock of our own."""

    def __init__(self, workers: int, kept_bytes: int = 100) -> None:
        self.now, self.deaths = 0.0, 0
        options = replace(
            make_options(tiny.split_bundle().parties["server"]), kept_bytes=kept_bytes
        )
        self.pool = WorkerPool(
            options, workers=workers, on_death=self._count, clock=lambda: self.now
        )

    def _count(self) -> None:
        self.deaths += 1

    def open(self, owner: str, session: str = "") -> RemoteExecutor:
        return self.pool.open(owner, session or owner * 32, None, 0)

    def work(self, executor: RemoteExecutor) -> Idle:
        """Let an executor make a step, and return its worker."""
        key = TaskKey("s", "train", executor.step, 0)
        executor.begin(key, data={}, seed=0, learning_rate=0.1)
        list(executor.advance(key))
        executor.finish(key)
        self.now += 1.0
        worker = executor._worker
        assert isinstance(worker, Idle)
        return worker


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Idle]:
    Idle.started = []
    monkeypatch.setattr(pools, "Worker", Idle)
    return Idle.started


def test_an_owner_s_sessions_have_one_worker_and_each_nameless_one_its_own(
    started: list[Idle],
) -> None:
    ward = Ward(8)
    assert ward.work(ward.open("a", "1" * 32)) is ward.work(ward.open("a", "2" * 32))
    assert ward.work(ward.open("", "3" * 32)) is not ward.work(ward.open("", "4" * 32))
    assert len(started) == 3


def test_the_place_of_whoever_has_had_one_the_longest_is_taken(started: list[Idle]) -> None:
    ward = Ward(2)
    ana, ben = ward.open("a"), ward.open("b")
    first, second = ward.work(ana), ward.work(ben)
    third = ward.work(ward.open("c"))
    assert [worker.is_alive for worker in (first, second, third)] == [False, True, True]
    assert not ana.is_lost  # its state was fetched
    assert ward.work(ana) not in (first, second, third)
    assert not second.is_alive


def test_nobody_with_an_open_task_loses_its_place(started: list[Idle]) -> None:
    ward = Ward(1)
    ana = ward.open("a")
    worker = ward.work(ana)
    ana.begin(TaskKey("s", "train", 1, 0), data={}, seed=0, learning_rate=0.1)
    with pytest.raises(ServerBusy, match="1 workers"):
        ward.work(ward.open("b"))
    assert worker.is_alive


def test_each_worker_keeps_its_share_of_what_all_may(started: list[Idle]) -> None:
    ward = Ward(4, kept_bytes=120)
    first = ward.work(ward.open("a"))
    assert (first.kept_bytes(), first.tidied) == (120, 0)
    ward.work(ward.open("b"))
    assert (first.kept_bytes(), first.tidied) == (60, 1)


def test_a_worker_without_sessions_ends_after_a_while_and_not_before(started: list[Idle]) -> None:
    ward = Ward(4)
    ana, ben = ward.open("a"), ward.open("b")
    first, second = ward.work(ana), ward.work(ben)
    ana.close()
    ward.now += 60.0
    ward.pool.retire_idle(60.0)
    assert first.is_alive
    ward.now += 1.0
    ward.pool.retire_idle(60.0)
    assert [first.is_alive, second.is_alive] == [False, True]


def test_the_second_end_over_one_task_is_told_and_a_success_forgets_the_first(
    started: list[Idle],
) -> None:
    ward = Ward(1)
    key, other = TaskKey("s", "train", 3, 0), TaskKey("s", "train", 4, 0)
    ends = [ward.pool.note_death(k, "s", "it ended").is_repeated for k in (key, other, key)]
    assert ends == [False, False, True]
    ward.pool.note_success(other)
    assert not ward.pool.note_death(other, "s", "it ended").is_repeated
    assert not ward.pool.note_death(None, "s", "it ended").is_repeated
    assert ward.deaths == 5


def test_why_no_worker_starts_is_logged_and_the_client_not_told(
    started: list[Idle], caplog: pytest.LogCaptureFixture
) -> None:
    error = Ward(1).pool.note_failed_start(None, "s", "/opt/secret is missing")
    assert error.is_early
    assert "secret" in caplog.text
    assert "secret" not in str(error)


def test_what_is_remembered_of_ends_is_bounded(started: list[Idle]) -> None:
    ward = Ward(1)
    for step in range(MAX_REMEMBERED + 1):
        ward.pool.note_death(TaskKey("s", "train", step, 0), "s", "it ended")
    assert not ward.pool.note_death(TaskKey("s", "train", 0, 0), "s", "it ended").is_repeated
    last = TaskKey("s", "train", MAX_REMEMBERED, 0)
    assert ward.pool.note_death(last, "s", "it ended").is_repeated


def test_a_closed_pool_has_ended_every_worker_and_may_be_closed_again(started: list[Idle]) -> None:
    ward = Ward(4)
    workers = [ward.work(ward.open(owner)) for owner in "abc"]
    ward.pool.close()
    ward.pool.close()
    assert not any(worker.is_alive for worker in workers)
