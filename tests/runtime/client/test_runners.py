"""The client's half of a task: carried through, saved, gone back, and given up."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import LocalProtocolError, NotSaved, StepsLost
from splitonnx.interrupts import noting_interrupts
from splitonnx.messages import TaskKey
from splitonnx.runtime.client.runners import TaskRunner
from splitonnx.runtime.client.training_runs import TrainingRun
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.storage.positions import DataPosition
from tests.support import tiny
from tests.support.interrupts import lose_interrupt, taking_interrupts


class Server:
    """A channel to the tiny model's other half, computed by numpy, which fails as it is told."""

    def __init__(self) -> None:
        self.state = tiny.reference_state()
        self.calls: list[str] = []
        self.why_unsaved = ""
        self.loses: StepsLost | None = None
        self.breaks: BaseException | None = None
        self.traffic = (0, 0)
        self.in_flight = 1
        self._key: TaskKey | None = None
        self._sent: Mapping[str, np.ndarray] = {}

    def end(self, key: TaskKey) -> None:
        self.calls.append(f"end {key.phase} {key.step}")

    def end_all(self) -> None:
        self.calls.append("end all")

    def send_wires(
        self, key: TaskKey, wires: Mapping[str, np.ndarray], seed: int, learning_rate: float
    ) -> None:
        if key != self._key:
            self.calls.append(f"begin {key.phase} {key.step}")
        self._key, self._sent = key, {**self._sent, **wires}

    def receive_wires(self) -> tuple[TaskKey | None, dict[str, np.ndarray]]:
        if self.breaks is not None:
            raise self.breaks
        if self.loses is not None:
            raise self.loses
        h, labels = self._sent["h"], self._sent["labels"]
        difference = h @ self.state["W2"].astype(np.float32) - labels
        grad = 2 * difference / difference.size @ self.state["W2"].T.astype(np.float32)
        return self._key, {"h.grad": grad, "loss": np.mean(difference**2)}

    def save(self, step: int, *, publish: bool = False, keep: bool = False) -> str:
        self.calls.append(f"{'publish' if publish else 'save'} {step}")
        return self.why_unsaved

    def close(self, *, for_good: bool = True) -> None:
        self.calls.append("bye" if for_good else "hang up")


POSITION = DataPosition(epoch=0, batch=1, batch_size=6, seed=0, shuffle=True, samples=6)


def open_runner(party: PartyBundle, server: Server | None) -> TaskRunner:
    executor = Executor(party, Engine(threads=1))
    run = TrainingRun.open(executor, resume=False)
    return TaskRunner(executor, run, server, seed=0)  # type: ignore[arg-type]


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def party(tmp_path: Path) -> PartyBundle:
    tiny.split_bundle().save(tmp_path / "bundle")
    return Bundle.load(tmp_path / "bundle").client


@pytest.fixture
def runner(party: PartyBundle, server: Server) -> TaskRunner:
    return open_runner(party, server)


def test_a_whole_model_s_step_is_numpy_s() -> None:
    runner = open_runner(tiny.local_bundle().client, None)
    reference = tiny.reference_state()
    results = runner.perform("train", tiny.batch(0), tiny.RATE)
    assert results["loss"] == pytest.approx(tiny.reference_step(reference, tiny.batch(0)), 1e-5)
    assert runner.executor.step == 1
    assert runner.traffic == (0, 0)
    for name, array in runner.executor.state().items():
        np.testing.assert_allclose(array, reference[name], rtol=1e-5, atol=1e-6)


def test_a_step_goes_back_and_forth_between_the_two_halves(
    runner: TaskRunner, server: Server
) -> None:
    reference = tiny.reference_state()
    results = runner.perform("train", tiny.batch(0), tiny.RATE)
    assert results["loss"] == pytest.approx(tiny.reference_step(reference, tiny.batch(0)), 1e-5)
    np.testing.assert_allclose(runner.executor.state()["W1"], reference["W1"], rtol=1e-5, atol=1e-6)
    assert server.calls == ["begin train 0", "end train 0", "end all"]


def test_after_an_error_the_state_is_as_before_and_the_runner_is_closed(
    runner: TaskRunner, server: Server
) -> None:
    before = runner.executor.state()
    server.breaks = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        runner.perform("train", tiny.batch(0), tiny.RATE)
    assert server.calls == ["begin train 0", "bye", "end all"]
    for name, array in runner.executor.state().items():
        np.testing.assert_array_equal(array, before[name])
    key = TaskKey(session=runner.run.session, phase="train", step=0, micro_batch=0)
    with pytest.raises(LocalProtocolError, match="not open"):
        runner.executor.is_finished(key)
    with pytest.raises(LocalProtocolError, match="closed"):
        runner.perform("train", tiny.batch(0), tiny.RATE)


def test_no_task_begins_after_an_interrupt_whose_exception_was_discarded(
    runner: TaskRunner, server: Server
) -> None:
    with taking_interrupts(), noting_interrupts():
        lose_interrupt()
        with pytest.raises(KeyboardInterrupt):
            runner.perform("train", tiny.batch(0), tiny.RATE)
    assert server.calls == []
    runner.perform("train", tiny.batch(0), tiny.RATE)  # nothing was begun that is in the way
    assert runner.executor.step == 1


def test_where_the_server_lost_steps_this_half_goes_back_too_and_can_go_on(
    runner: TaskRunner, server: Server
) -> None:
    runner.perform("train", tiny.batch(0), tiny.RATE)
    runner.checkpoint(POSITION, "stop")
    kept = runner.executor.state()["W1"]
    runner.perform("train", tiny.batch(1), tiny.RATE)
    server.loses = StepsLost(1)
    with pytest.raises(StepsLost):
        runner.perform("train", tiny.batch(2), tiny.RATE)
    assert (runner.executor.step, runner.position) == (1, POSITION)
    np.testing.assert_array_equal(runner.executor.state()["W1"], kept)
    server.loses = None
    runner.perform("train", tiny.batch(1), tiny.RATE)
    assert runner.executor.step == 2


def test_the_server_saves_first_and_then_this_half(
    runner: TaskRunner, server: Server, party: PartyBundle
) -> None:
    runner.perform("train", tiny.batch(0), tiny.RATE)
    server.why_unsaved = "the disk is full"
    with pytest.raises(NotSaved, match="the disk is full"):
        runner.checkpoint(POSITION, "stop")
    assert not runner.run.has_checkpoints
    server.why_unsaved = ""
    runner.checkpoint(POSITION, "stop")
    assert runner.run.find_resume_point(1).kept == (1,)


def test_this_half_writes_first_where_its_last_checkpoint_failed(
    runner: TaskRunner, server: Server
) -> None:
    """Else one side would be two ahead, and no step would be with both."""
    runner.perform("train", tiny.batch(0), tiny.RATE)
    runner.run.is_behind = True
    server.why_unsaved = "the disk is full"
    with pytest.raises(NotSaved):
        runner.checkpoint(POSITION, "stop")
    assert runner.run.find_resume_point(1).kept == (1,)


def test_training_continues_unsaved_where_it_is_told_to(
    runner: TaskRunner, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.why_unsaved = "the disk is full"
    with caplog.at_level(logging.WARNING):
        runner.checkpoint(POSITION, "continue")
    assert "the disk is full" in caplog.text


def test_the_session_is_kept_where_one_half_alone_was_published(
    runner: TaskRunner, server: Server
) -> None:
    server.why_unsaved = "the disk is full"
    with pytest.raises(NotSaved):
        runner.publish()
    runner.close()
    assert server.calls[-1] == "hang up"


def test_a_finished_run_says_good_bye_once(
    runner: TaskRunner, server: Server, party: PartyBundle
) -> None:
    runner.perform("train", tiny.batch(0), tiny.RATE)
    runner.checkpoint(POSITION, "stop")
    runner.publish()
    runner.close()
    runner.close()
    assert server.calls[-2:] == ["publish 1", "bye"]
    assert party.path is not None
    assert PartyBundle.load(party.path).step == 1


def test_an_unfinished_run_only_hangs_up(runner: TaskRunner, server: Server) -> None:
    runner.perform("train", tiny.batch(0), tiny.RATE)
    runner.checkpoint(POSITION, "stop")
    runner.close()
    assert server.calls[-1] == "hang up"


def test_predictions_and_evaluations_are_numbered_apart_from_steps(
    runner: TaskRunner, server: Server
) -> None:
    data = {**tiny.batch(0), "y": np.zeros((6, 2), np.float32)}
    with patch.object(runner.executor, "begin", wraps=runner.executor.begin) as begin:
        runner.perform("train", tiny.batch(0), tiny.RATE)
        runner.perform("evaluate", data, tiny.RATE)
        runner.perform("evaluate", data, tiny.RATE)
    begun = [(call.args[0].phase, call.args[0].step) for call in begin.call_args_list]
    assert begun == [("train", 0), ("evaluate", 0), ("evaluate", 1)]
