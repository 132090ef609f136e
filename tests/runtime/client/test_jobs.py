"""What a client runs for a task or a step, piece by piece, held against what runs at once."""

from __future__ import annotations

from collections import deque

import msgspec
import numpy as np
import pytest

from splitonnx.errors import RemoteProtocolError, UsageError
from splitonnx.messages import TaskKey
from splitonnx.micro_batches import MICRO_BATCH_WEIGHT, MICRO_BATCHES
from splitonnx.names import ACCUMULATE, COUNTED, LOSS, UPDATE
from splitonnx.optimizers import SGD
from splitonnx.partitioner.partitions import cut
from splitonnx.pipelines import StepDivision
from splitonnx.runtime.channels.greetings import SharingTerms
from splitonnx.runtime.client.jobs import (
    Ended,
    Job,
    JobMaker,
    PlannedTask,
    Sending,
    StepPlan,
    choose_in_flight,
)
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from tests.support import tiny
from tests.support.exchange_players import make_manifest
from tests.support.zoo import ZOO

SESSION = "5" * 32


def make_job(executor: Executor) -> Job:
    key = TaskKey(SESSION, "train", executor.step, 0)
    task = PlannedTask(key=key, data=tiny.batch(0))
    job = JobMaker(executor, seed=0).make([task], tiny.RATE, permitted=1)
    job.begin()
    return job


def answer(sent: Sending, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute the reply of the tiny model's server by numpy."""
    hidden, labels = sent.wires["h"], sent.wires["labels"]
    difference = hidden @ state["W2"].astype(np.float32) - labels
    gradient = 2 * difference / difference.size @ state["W2"].T.astype(np.float32)
    return {"h.grad": gradient, "loss": np.mean(difference**2)}


def test_a_task_runs_in_two_pieces_around_the_reply() -> None:
    executor = Executor(tiny.split_bundle().client, Engine(threads=1))
    reference = tiny.reference_state()
    job = make_job(executor)
    assert job.is_ready
    (sent,) = job.work()
    assert isinstance(sent, Sending)
    assert not job.is_ready
    job.deliver(sent.key, answer(sent, reference))
    assert job.is_ready
    assert list(job.work()) == [Ended(key=sent.key)]
    assert job.is_done
    expected = tiny.reference_step(reference, tiny.batch(0))
    assert job.results[0]["loss"] == pytest.approx(expected, 1e-5)
    np.testing.assert_allclose(executor.state()["W1"], reference["W1"], rtol=1e-5, atol=1e-6)


def test_a_reply_to_a_task_of_another_job_is_refused() -> None:
    job = make_job(Executor(tiny.split_bundle().client, Engine(threads=1)))
    list(job.work())
    with pytest.raises(RemoteProtocolError, match="which is not open"):
        job.deliver(TaskKey(SESSION, "train", 7, 0), {})


def test_a_reply_that_brings_nothing_is_refused() -> None:
    """It would count as progress, so a server could hold up a client with such replies for ever."""
    job = make_job(Executor(tiny.split_bundle().client, Engine(threads=1)))
    (sent,) = job.work()
    with pytest.raises(RemoteProtocolError, match="no tensors"):
        job.deliver(sent.key, {})


def test_an_abandoned_job_leaves_the_state_and_the_task_can_begin_again() -> None:
    executor = Executor(tiny.split_bundle().client, Engine(threads=1))
    before = executor.state()
    job = make_job(executor)
    list(job.work())
    job.abandon()
    np.testing.assert_array_equal(executor.state()["W1"], before["W1"])
    assert executor.step == 0
    make_job(executor)


def run_step(job: Job, server: Executor) -> None:
    """Run a step's job against its server's executor, which answers in the order of messages."""
    replies: deque[tuple[TaskKey, dict[str, np.ndarray]]] = deque()
    unfinished: list[TaskKey] = []
    while not job.is_done:
        if not job.is_ready:
            assert replies, "the client waits for the server, and the server for the client"
            job.deliver(*replies.popleft())
            continue
        for event in job.work():
            if not isinstance(event, Sending):
                continue
            if event.key not in unfinished:
                server.begin(event.key, data={}, seed=0, learning_rate=0.1)
                unfinished.append(event.key)
            server.deliver(event.key, event.wires)
            for key in tuple(unfinished):
                replies.extend((key, wires) for wires in server.advance(key))
                if server.is_finished(key) and key == unfinished[0]:
                    server.finish(unfinished.pop(0))


def test_a_step_with_clipping_ends_the_same_however_many_tasks_are_in_flight() -> None:
    entry = ZOO["convolutions"]
    bundle = cut(entry.build(), at="r1", loss=entry.loss, optimizer=SGD(clip_norm=0.01))
    assert bundle.server is not None
    states = []
    for in_flight in (1, 2, 3):
        client = Executor(bundle.client, Engine(threads=1))
        data = [{**entry.data(4), MICRO_BATCH_WEIGHT: np.array(0.5, np.float32)}] * 2
        planned = [*((ACCUMULATE, one) for one in data), (UPDATE, {MICRO_BATCHES: np.array(2)})]
        tasks = [
            PlannedTask(key=TaskKey(SESSION, phase, 0, number), data=one)
            for number, (phase, one) in enumerate(planned)
        ]
        maker = JobMaker(client, seed=0)
        maker.divide(None, StepDivision(count=len(tasks) - 1, in_flight=in_flight))
        job = maker.make(tasks, 0.1, permitted=in_flight)
        job.begin()
        server = Executor(bundle.server, Engine(threads=1))
        run_step(job, server)
        assert client.step == server.step == 1
        states.append({**client.state(), **server.state()})
    for name, array in states[0].items():
        for other in states[1:]:
            np.testing.assert_array_equal(other[name], array)


def test_a_step_is_planned_as_micro_batches_and_an_update_and_its_results_are_their_means() -> None:
    plan = StepPlan(make_manifest(), tiny.batch(0, 5), 2)
    assert [len(part["x"]) for part in plan.parts] == [3, 2]
    plan.weigh([{LOSS + COUNTED: np.array(6.0)}, {LOSS + COUNTED: np.array(4.0)}])
    assert [float(part[MICRO_BATCH_WEIGHT]) for part in plan.parts] == [
        pytest.approx(0.6),
        pytest.approx(0.4),
    ]
    tasks = plan.list_tasks(SESSION, 7)
    assert [(task.key.phase, task.key.step, task.key.micro_batch) for task in tasks] == [
        ("accumulate", 7, 0),
        ("accumulate", 7, 1),
        ("update", 7, 2),
    ]
    assert tasks[0].data is plan.parts[0]
    assert tasks[2].data[MICRO_BATCHES] == 2
    results = [{"loss": np.array(1.0)}, {"loss": np.array(2.0)}, {}]
    assert plan.join(results)["loss"] == pytest.approx(0.6 * 1.0 + 0.4 * 2.0)


def test_a_step_is_divided_only_where_bundle_and_server_permit_it() -> None:
    manifest = make_manifest()
    division = StepDivision(count=4, in_flight=3)
    permitting = SharingTerms(can_accumulate=True)
    assert choose_in_flight(manifest, permitting, division) == 1  # a piece reads what a later gives
    free = msgspec.structs.replace(
        manifest,
        phases=tuple(msgspec.structs.replace(phase, commits={}) for phase in manifest.phases),
    )
    assert choose_in_flight(free, permitting, division) == 3
    assert choose_in_flight(free, None, division) == 3
    with pytest.raises(UsageError, match="does not let a step consist of several"):
        choose_in_flight(manifest, SharingTerms(can_accumulate=False), division)
    with pytest.raises(UsageError, match="cut by an earlier version"):
        choose_in_flight(tiny.split_bundle().client.manifest, permitting, division)
