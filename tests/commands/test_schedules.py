"""--lr-schedule and --warmup as the command line spells them."""

from __future__ import annotations

import pytest

from splitonnx.commands.schedules import ScheduleOptions
from splitonnx.errors import UsageError
from splitonnx.schedules import CosineSchedule, Epochs, OneCycleSchedule, Schedule, StepSchedule


@pytest.mark.parametrize(
    ("lr_schedule", "warmup", "expected"),
    [
        (None, None, None),
        (None, "500", Schedule(warmup=500)),
        ("cosine", "0.5epochs", CosineSchedule(warmup=Epochs(0.5))),
        ("cosine=end-factor:0.01", "1epoch", CosineSchedule(warmup=Epochs(1), end_factor=0.01)),
        ("step=step-size:30epochs,gamma:0.5", None, StepSchedule(step_size=Epochs(30), gamma=0.5)),
        ("step=step-size:10", None, StepSchedule(step_size=10)),
        ("one-cycle=pct-start:0.1", None, OneCycleSchedule(pct_start=0.1)),
    ],
)
def test_options_become_a_schedule(
    lr_schedule: str | None, warmup: str | None, expected: Schedule | None
) -> None:
    assert ScheduleOptions(lr_schedule=lr_schedule, warmup=warmup).read() == expected


@pytest.mark.parametrize(
    ("lr_schedule", "warmup", "expected"),
    [
        ("cosine=", None, "write it as NAME=SETTING:VALUE"),
        ("cosine=end-factor", None, "write it as NAME=SETTING:VALUE"),
        ("step=gamma:1,gamma:0.5", None, "each setting once"),
        ("step=step-size:10,gamma:fast", None, "--lr-schedule gamma fast: write a number"),
        ("step=step-size:1.5", None, "--lr-schedule step-size 1.5: write a number of steps"),
        ("step", None, "step=step-size:30epochs"),
        ("cosine=warmup:3", "3", "exclude each other"),
        ("cosine", "-1", "--warmup -1: write a number of steps"),
        ("cosine", "someepochs", "--warmup some"),
        ("wave", None, "no learning-rate schedule 'wave'"),
    ],
)
def test_malformed_options_are_refused(
    lr_schedule: str | None, warmup: str | None, expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        ScheduleOptions(lr_schedule=lr_schedule, warmup=warmup).read()
