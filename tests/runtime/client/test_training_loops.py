"""The loop of training: epochs, records, checkpoints, and steps that are made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from splitonnx.errors import StepsLost
from splitonnx.names import EVALUATE, TRAIN
from splitonnx.runtime.channels.greetings import SharingTerms
from splitonnx.runtime.client.datasets import open_dataset
from splitonnx.runtime.client.histories import Evaluation, StepRecord
from splitonnx.runtime.client.options import FitOptions
from splitonnx.runtime.client.training_loops import MOST_RETURNS, TrainingLoop
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.storage.positions import Best, DataPosition
from splitonnx.schedules import CosineSchedule, Epochs, StepSchedule, plan_rates
from splitonnx.stopping import EarlyStopping
from tests.support import tiny

DATA = {
    name: np.concatenate([tiny.batch(seed)[name] for seed in range(3)]) for name in ("x", "labels")
}
"""18 samples: 5 batches of 4, of which the last has 2."""
START = DataPosition(epoch=0, batch=0, batch_size=4, seed=0, shuffle=False, samples=18)


class Runner:
    """Carries out tasks without computing: the loss is the step, predictions are zeros.

    ``fails`` is asked before each step and may raise.  Nothing is shared.
    """

    def __init__(self, executor: Executor) -> None:
        self.position: DataPosition | None = None
        self.traffic = (0, 0)
        self.terms = SharingTerms()
        self.calls: list[str] = []
        self.kept: dict[int, DataPosition] = {}
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.batches: list[np.ndarray] = []
        self.fails: Callable[[int], None] = lambda step: None
        self._executor = executor

    def perform(
        self, phase: str, data: Mapping[str, np.ndarray], learning_rate: float
    ) -> dict[str, np.ndarray]:
        if phase == TRAIN:
            self.fails(self._executor.step)
            self._executor.step += 1
            self.traffic = (self.traffic[0] + 10, self.traffic[1] + 7)
            self.rates.append(learning_rate)
            self.batches.append(data["x"])
            step = self._executor.step
            return {"loss": np.array(step), "accuracy": np.array(0.5), "y": np.zeros((4, 2))}
        if phase == EVALUATE:
            loss = self.losses.pop(0) if self.losses else data["labels"].mean()
            return {"loss": np.array(loss), "mae": np.array(1.0)}
        return {"y": np.zeros((len(data["x"]), 2), np.float32)}

    def train(
        self, batch: Mapping[str, np.ndarray], learning_rate: float, accumulate: int
    ) -> dict[str, np.ndarray]:
        self.calls.extend([f"accumulate {accumulate}"] if accumulate > 1 else [])
        return self.perform(TRAIN, batch, learning_rate)

    def checkpoint(self, position: DataPosition, when_unsaved: str, *, keep: bool = False) -> bool:
        if keep:
            self.kept[self._executor.step] = position
            self.calls.append(f"keep {self._executor.step}")
            return True
        self.position = position
        self.calls.append(f"checkpoint {self._executor.step} {when_unsaved}")
        return True

    def return_to(self, step: int) -> None:
        self.calls.append(f"return to {step}")
        self.position, self._executor.step = self.kept[step], step

    def publish(self) -> None:
        self.calls.append("publish")

    def go_back(self, step: int) -> None:
        """Do as a server that lost its steps."""
        self._executor.step = step
        raise StepsLost(step)


class Loop:
    """A loop over a runner that computes nothing."""

    def __init__(self) -> None:
        self.executor = Executor(tiny.local_bundle().client, Engine(threads=1))
        self.runner = Runner(self.executor)
        self.loop = TrainingLoop(self.executor, self.runner, seed=0)  # type: ignore[arg-type]
        self.options = FitOptions(
            training=open_dataset(DATA),
            held_out=None,
            epochs=1,
            learning_rate=None,
            rates=None,
            stopping=None,
            checkpoint_every=None,
            when_unsaved="stop",
            save=False,
            on_step=None,
            on_epoch=None,
        )

    def fit(self, start: DataPosition = START, **changes: Any) -> Any:
        return self.loop.fit(replace(self.options, **changes), start)


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_each_step_is_recorded_with_its_samples_and_its_own_traffic(loop: Loop) -> None:
    seen: list[StepRecord] = []
    history = loop.fit(on_step=seen.append)
    assert history.steps == seen
    assert [record.step for record in seen] == [1, 2, 3, 4, 5]
    assert [record.batch for record in seen] == [1, 2, 3, 4, 5]
    assert [record.samples for record in seen] == [4, 4, 4, 4, 2]
    assert {(record.bytes_up, record.bytes_down) for record in seen} == {(10, 7)}
    assert [record.loss for record in seen] == [1, 2, 3, 4, 5]
    assert seen[0].metrics == {"accuracy": 0.5}  # arrays are no metrics


def test_epochs_are_counted_from_0_and_steps_over_all_of_them(loop: Loop) -> None:
    history = loop.fit(epochs=2)
    assert [record.epoch for record in history.steps] == [0] * 5 + [1] * 5
    assert [record.step for record in history.steps] == [*range(1, 11)]


def test_a_run_that_resumes_makes_the_rest_and_no_more(loop: Loop) -> None:
    whole = Loop()
    whole.fit(epochs=2)
    position = DataPosition(epoch=1, batch=2, batch_size=4, seed=0, shuffle=False, samples=18)
    history = loop.fit(position, epochs=2)
    assert [(record.epoch, record.batch) for record in history.steps] == [(1, 3), (1, 4), (1, 5)]
    for batch, expected in zip(loop.runner.batches, whole.runner.batches[7:], strict=True):
        np.testing.assert_array_equal(batch, expected)


def test_the_learning_rate_may_follow_the_updates(loop: Loop) -> None:
    loop.fit(learning_rate=lambda step: 0.1 / (step + 1))
    assert loop.runner.rates == pytest.approx([0.1, 0.05, 0.1 / 3, 0.025, 0.02])
    loop.fit(learning_rate=0.5)
    assert loop.runner.rates[5:] == [0.5] * 5
    loop.fit()
    assert loop.runner.rates[10:] == [tiny.RATE] * 5


def test_a_schedule_multiplies_the_rate_of_each_step_and_the_records_say_it(loop: Loop) -> None:
    plan = plan_rates(StepSchedule(step_size=Epochs(1), gamma=0.5), epochs=2, steps_per_epoch=5)
    history = loop.fit(epochs=2, learning_rate=0.8, rates=plan)
    assert loop.runner.rates == [0.8] * 5 + [0.4] * 5
    assert [record.learning_rate for record in history.steps] == loop.runner.rates
    loop.fit(rates=plan)
    assert loop.runner.rates[10:] == [tiny.RATE] * 5


def test_a_run_that_resumes_has_the_rates_of_one_that_was_not_interrupted(loop: Loop) -> None:
    plan = plan_rates(CosineSchedule(warmup=3), epochs=2, steps_per_epoch=5)
    whole = Loop()
    whole.fit(epochs=2, rates=plan)
    position = DataPosition(epoch=1, batch=2, batch_size=4, seed=0, shuffle=False, samples=18)
    loop.fit(position, epochs=2, rates=plan)
    assert loop.runner.rates == whole.runner.rates[7:]


ONE = open_dataset({name: array[:4] for name, array in DATA.items()})
"""Held-out data of one batch, so that the losses of the runner are those of the evaluations."""


def stop_by_loss(patience: int | None) -> EarlyStopping:
    return EarlyStopping(metric="loss", patience=patience)


def test_training_stops_when_patience_is_over_and_ends_at_the_best_state(loop: Loop) -> None:
    loop.runner.losses = [3, 1, 2, 1, 0]
    history = loop.fit(epochs=9, held_out=ONE, stopping=stop_by_loss(2), save=True)
    assert [evaluation.metrics["loss"] for evaluation in history.evaluations] == [3, 1, 2, 1]
    assert history.best == Best(epoch=1, step=10, value=1, waited=2)
    assert loop.runner.calls == ["keep 5", "keep 10", "return to 10", "publish"]
    assert loop.executor.step == 10
    assert loop.runner.position is not None
    assert loop.runner.position.epoch == 9  # a run that is resumed makes no further step


def test_the_best_state_may_be_kept_without_stopping(loop: Loop) -> None:
    loop.runner.losses = [3, 1, 2, 2, 2]
    history = loop.fit(epochs=5, held_out=ONE, stopping=stop_by_loss(None))
    assert (len(history.evaluations), loop.executor.step) == (5, 10)


def test_at_the_best_state_nothing_is_returned_to(loop: Loop) -> None:
    loop.runner.losses = [3, float("nan"), 1]
    loop.fit(epochs=3, held_out=ONE, stopping=stop_by_loss(2))
    assert loop.runner.calls == ["keep 5", "keep 15"]


def test_a_first_loss_that_is_not_finite_is_replaced_by_any_other(loop: Loop) -> None:
    loop.runner.losses = [float("nan"), 7]
    history = loop.fit(epochs=2, held_out=ONE, stopping=stop_by_loss(2))
    assert history.best == Best(epoch=1, step=10, value=7)


def test_a_run_that_resumes_goes_on_waiting(loop: Loop) -> None:
    loop.runner.losses = [2, 2]
    best = Best(epoch=0, step=5, value=1, waited=1)
    start = msgspec.structs.replace(START, epoch=2, best=best)
    loop.runner.kept[5] = START
    loop.executor.step = 10
    history = loop.fit(start, epochs=9, held_out=ONE, stopping=stop_by_loss(3))
    assert [evaluation.epoch for evaluation in history.evaluations] == [2, 3]
    assert loop.runner.calls == ["return to 5"]


def test_checkpoints_come_every_so_many_steps_of_the_bundle_s_life(loop: Loop) -> None:
    loop.executor.step = 1
    loop.fit(checkpoint_every=2, when_unsaved="continue")
    assert loop.runner.calls == [f"checkpoint {step} continue" for step in (2, 4, 6)]
    assert loop.runner.position is not None
    assert loop.runner.position.epoch == 1  # where the whole fit ended


def test_held_out_data_are_evaluated_after_each_epoch_and_weighted_by_their_samples(
    loop: Loop,
) -> None:
    held_out = open_dataset({**DATA, "labels": np.arange(36, dtype=np.float32).reshape(18, 2)})
    told: list[Evaluation] = []
    history = loop.fit(epochs=2, held_out=held_out, on_epoch=told.append)
    assert history.evaluations == told
    assert [one.epoch for one in told] == [0, 1]
    assert told[0].metrics == {"loss": pytest.approx(17.5), "mae": pytest.approx(1)}


def test_the_outcome_is_published_where_that_was_asked_for(loop: Loop) -> None:
    loop.fit()
    assert loop.runner.calls == []
    loop.fit(save=True)
    assert loop.runner.calls == ["publish"]


def test_steps_that_the_server_lost_are_made_again_and_recorded_once(loop: Loop) -> None:
    lost = iter([False, False, False, True])

    def lose_once(step: int) -> None:
        if next(lost, False):
            loop.runner.position = replace_batch(2)
            loop.runner.go_back(2)

    loop.runner.fails = lose_once
    history = loop.fit(checkpoint_every=2)
    assert [record.step for record in history.steps] == [1, 2, 3, 4, 5]
    assert len(loop.runner.batches) == 6
    np.testing.assert_array_equal(loop.runner.batches[2], loop.runner.batches[3])


def replace_batch(batch: int) -> DataPosition:
    return DataPosition(epoch=0, batch=batch, batch_size=4, seed=0, shuffle=False, samples=18)


def test_steps_from_before_the_fit_are_not_its_to_make_again(loop: Loop) -> None:
    loop.executor.step = 5

    def lose(step: int) -> None:
        loop.runner.go_back(3)

    loop.runner.fails = lose
    with pytest.raises(StepsLost):
        loop.fit()


def test_a_resumed_training_makes_steps_again_from_before_it_was_resumed(loop: Loop) -> None:
    loop.executor.step = 2
    lost = iter([True])

    def lose_once(step: int) -> None:
        if next(lost, False):
            loop.runner.position = replace_batch(1)
            loop.runner.go_back(1)

    loop.runner.fails = lose_once
    history = loop.fit(start=replace_batch(2))
    assert [record.step for record in history.steps] == [2, 3, 4, 5]
    assert [record.batch for record in history.steps] == [2, 3, 4, 5]


def test_a_position_of_another_training_is_not_gone_back_to(loop: Loop) -> None:
    loop.executor.step = 2

    def lose(step: int) -> None:
        loop.runner.position = msgspec.structs.replace(replace_batch(1), seed=9)
        loop.runner.go_back(1)

    loop.runner.fails = lose
    with pytest.raises(StepsLost):
        loop.fit(start=replace_batch(2))


def test_a_server_that_loses_every_step_is_given_up_in_the_end(loop: Loop) -> None:
    asked = 0

    def lose(step: int) -> None:
        nonlocal asked
        asked += 1
        loop.runner.go_back(0)

    loop.runner.fails = lose
    with pytest.raises(StepsLost):
        loop.fit()
    assert asked == MOST_RETURNS


def test_a_smaller_last_batch_is_left_out_where_the_model_fixes_the_batch(loop: Loop) -> None:

    manifest = loop.executor.manifest
    phases = tuple(
        msgspec.structs.replace(
            phase,
            data=tuple(
                msgspec.structs.replace(spec, shape=(4, *spec.shape[1:])) for spec in phase.data
            ),
        )
        for phase in manifest.phases
    )
    loop.loop._manifest = msgspec.structs.replace(manifest, phases=phases)
    assert [record.samples for record in loop.fit().steps] == [4] * 4
