"""The loop of training where the server joins what its clients learn: when a client shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from splitonnx.errors import StepsLost
from splitonnx.runtime.channels.greetings import SharingTerms
from splitonnx.runtime.client.histories import History
from splitonnx.runtime.client.training_loops import TrainingLoop
from splitonnx.runtime.engine.executors import Executor
from tests.runtime.client.test_training_loops import START, Loop, Runner


class SharingRunner(Runner):
    """Shares without a server: each share with samples closes a round.

    ``losing`` is asked before each share, and may raise.
    """

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self.terms = SharingTerms(policy="splitfed-v1", local_steps=2, rounds=0)
        self.round = self.start = 0
        self.losing: Callable[[int], None] = lambda step: None

    @property
    def is_at_start(self) -> bool:
        return self._executor.step == self.start

    def share(self, samples: int, *, leaves: bool) -> int:
        self.losing(self._executor.step)
        self.round += samples > 0
        self.calls.append(f"share {samples}{' and leave' if leaves else ''}")
        return self.round


class SharingLoop(Loop):
    """A loop over such a runner."""

    runner: SharingRunner

    def __init__(self) -> None:
        super().__init__()
        self.runner = SharingRunner(self.executor)
        self.loop = TrainingLoop(self.executor, self.runner, seed=0)  # type: ignore[arg-type]

    def run(self, **changes: Any) -> History:
        start = changes.pop("start", START)
        self.runner.terms = replace(self.runner.terms, rounds=changes.pop("rounds", 0))
        history: History = self.fit(start, **changes)
        return history


@pytest.fixture
def loop() -> SharingLoop:
    return SharingLoop()


def test_a_client_shares_before_its_first_step_after_each_round_and_when_it_leaves(
    loop: SharingLoop,
) -> None:
    loop.run()  # batches of 4, 4, 4, 4 and 2 samples
    assert loop.runner.calls == ["share 0", "share 8", "share 8", "share 2 and leave"]


def test_a_client_that_keeps_checkpoints_can_return_from_its_first_share_on(
    loop: SharingLoop,
) -> None:
    loop.run(checkpoint_every=3)
    assert loop.runner.calls[:4] == ["checkpoint 0 stop", "share 0", "share 8", "checkpoint 2 stop"]
    assert loop.runner.calls[4:7] == ["checkpoint 3 stop", "share 8", "checkpoint 4 stop"]


def test_a_checkpoint_of_the_step_at_which_a_client_leaves_is_of_the_state_after_that(
    loop: SharingLoop,
) -> None:
    loop.run(checkpoint_every=1)
    assert loop.runner.calls[-3:] == [
        "checkpoint 4 stop",
        "share 2 and leave",
        "checkpoint 5 stop",
    ]
    position = loop.runner.position
    assert position is not None
    assert (position.unshared_steps, position.unshared_samples, position.round) == (0, 0, 3)


def test_a_round_that_ends_where_a_client_leaves_has_one_checkpoint(loop: SharingLoop) -> None:
    loop.run(rounds=1, checkpoint_every=2)
    assert loop.runner.calls == [
        "checkpoint 0 stop",
        "share 0",
        "share 8",
        "share 0 and leave",
        "checkpoint 2 stop",
    ]


def test_a_checkpoint_that_is_due_at_the_end_of_an_epoch_is_written_before_its_evaluation(
    loop: SharingLoop,
) -> None:
    calls = loop.runner.calls
    loop.run(
        checkpoint_every=5,
        epochs=2,
        held_out=loop.options.training,
        on_epoch=lambda evaluation: calls.append("evaluated"),
    )
    at = calls.index("evaluated")
    assert calls[at - 2 : at + 2] == [
        "checkpoint 4 stop",
        "checkpoint 5 stop",
        "evaluated",
        "share 6",
    ]
    assert calls[-4:] == ["share 6", "share 0 and leave", "checkpoint 10 stop", "evaluated"]


def test_a_client_stops_when_the_rounds_are_over(loop: SharingLoop) -> None:
    history = loop.run(rounds=1, save=True)
    assert [record.step for record in history.steps] == [1, 2]
    assert loop.runner.calls == ["share 0", "share 8", "share 0 and leave", "publish"]


def test_a_client_that_was_killed_after_the_last_round_trains_no_further(
    loop: SharingLoop,
) -> None:
    loop.run(rounds=2, checkpoint_every=100, epochs=3)
    position = loop.runner.position
    assert position is not None
    again = SharingLoop()
    again.executor.step, again.runner.round = 4, 2
    assert again.run(rounds=2, start=position, epochs=3, save=True).steps == []
    assert again.runner.calls == ["share 0 and leave", "publish"]


def test_a_client_that_comes_when_the_rounds_are_over_receives_the_model(
    loop: SharingLoop,
) -> None:
    loop.runner.round = 7
    assert loop.run(rounds=7, save=True).steps == []
    assert loop.runner.calls == ["share 0", "share 0 and leave", "publish"]


def test_a_server_that_lost_everything_is_asked_again_for_the_model_of_the_start(
    loop: SharingLoop,
) -> None:
    losses = [2]

    def lose(step: int) -> None:
        if step in losses:
            losses.remove(step)
            loop.executor.step = 0
            raise StepsLost(0)

    loop.runner.losing = lose
    loop.run(epochs=1)
    assert loop.runner.calls == ["share 0", "share 0", "share 8", "share 8", "share 2 and leave"]


def test_what_was_not_shared_is_counted_from_the_position_that_a_run_resumes_at(
    loop: SharingLoop,
) -> None:
    loop.executor.step = 1
    loop.run(start=msgspec.structs.replace(START, batch=1, unshared_steps=1, unshared_samples=4))
    assert loop.runner.calls == ["share 8", "share 8", "share 2 and leave"]


def test_a_run_that_is_continued_asks_for_the_model_of_the_others(loop: SharingLoop) -> None:
    loop.executor.step = loop.runner.start = 5
    loop.run(start=msgspec.structs.replace(START, epoch=1), epochs=2)
    assert loop.runner.calls[:2] == ["share 0", "share 8"]
