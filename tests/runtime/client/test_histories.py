"""What a training recorded: throughput, lines of JSON, and steps that are forgotten."""

from __future__ import annotations

import json

import msgspec

from splitonnx.runtime.client.histories import Evaluation, History, StepRecord


def record(step: int, *, epoch: int = 0, seconds: float = 0.5) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=epoch,
        batch=step,
        loss=1 / step,
        metrics={"accuracy": 0.25},
        learning_rate=0.1,
        samples=8,
        seconds=seconds,
        bytes_up=100,
        bytes_down=50,
    )


def evaluation(epoch: int) -> Evaluation:
    return Evaluation(epoch=epoch, metrics={"loss": 0.5}, seconds=1.0)


def test_a_step_s_throughput_is_samples_over_seconds() -> None:
    assert record(1, seconds=0.5).samples_per_second == 16


def test_throughput_is_of_all_samples_over_all_seconds_not_a_mean_of_means() -> None:
    history = History(steps=[record(1, seconds=1.0), record(2, seconds=3.0)])
    assert history.samples_per_second == 4


def test_what_took_no_time_has_no_throughput() -> None:
    assert record(1, seconds=0.0).samples_per_second == 0
    assert History().samples_per_second == 0


def test_steps_after_a_step_and_evaluations_from_an_epoch_on_are_forgotten() -> None:
    history = History(
        steps=[record(step, epoch=(step - 1) // 2) for step in (1, 2, 3, 4)],
        evaluations=[evaluation(0), evaluation(1)],
    )
    history.forget(3, 1)
    assert [one.step for one in history.steps] == [1, 2, 3]
    assert [one.epoch for one in history.evaluations] == [0]


def test_lists_that_others_hold_are_the_history_s_own() -> None:
    history = History(steps=[record(1), record(2)])
    steps = history.steps
    history.forget(1, 0)
    assert [one.step for one in steps] == [1]


def test_histories_do_not_share_their_lists() -> None:
    first, second = History(), History()
    first.steps.append(record(1))
    assert second.steps == []


def test_each_record_is_one_line_of_json_steps_first() -> None:
    history = History(steps=[record(1), record(2)], evaluations=[evaluation(0)])
    lines = list(history.as_json())
    assert [set(json.loads(line)) & {"step", "metrics", "epoch"} for line in lines] == [
        {"step", "metrics", "epoch"},
        {"step", "metrics", "epoch"},
        {"metrics", "epoch"},
    ]
    assert not any("\n" in line for line in lines)
    assert msgspec.json.decode(lines[1], type=StepRecord) == record(2)
    assert msgspec.json.decode(lines[2], type=Evaluation) == evaluation(0)
