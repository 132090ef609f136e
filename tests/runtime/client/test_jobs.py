"""What a client runs for a task or a step, piece by piece, held against what runs at once."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import RemoteProtocolError
from splitonnx.messages import TaskKey
from splitonnx.runtime.client.jobs import Ended, Job, PlannedTask, Sending
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from tests.support import tiny

SESSION = "5" * 32


def make_job(executor: Executor) -> Job:
    key = TaskKey(SESSION, "train", executor.step, 0)
    task = PlannedTask(key=key, data=tiny.batch(0))
    job = Job(executor, [task], in_flight=1, seed=0, learning_rate=tiny.RATE)
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


def test_an_abandoned_job_leaves_the_state_and_the_task_can_begin_again() -> None:
    executor = Executor(tiny.split_bundle().client, Engine(threads=1))
    before = executor.state()
    job = make_job(executor)
    list(job.work())
    job.abandon()
    np.testing.assert_array_equal(executor.state()["W1"], before["W1"])
    assert executor.step == 0
    make_job(executor)
