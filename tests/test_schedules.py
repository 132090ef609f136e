"""Learning-rate schedules against the rates of torch 2.13's schedulers with the same settings."""

from __future__ import annotations

import math

import pytest

from splitonnx.errors import UsageError
from splitonnx.schedules import (
    CosineSchedule,
    Duration,
    Epochs,
    LinearSchedule,
    OneCycleSchedule,
    Schedule,
    StepSchedule,
    list_schedules,
    plan_rates,
    read_schedule,
)

TORCH: dict[str, tuple[Schedule, list[float]]] = {
    "CosineAnnealingLR(o, 10)": (
        CosineSchedule(),
        [1.0, 0.975528258148, 0.904508497187, 0.793892626146, 0.654508497187, 0.5,
         0.345491502813, 0.206107373854, 0.095491502813, 0.024471741852],
    ),
    "CosineAnnealingLR(o, 8, eta_min=0.1)": (
        CosineSchedule(end_factor=0.1),
        [1.0, 0.96574578963, 0.868198051534, 0.722207544564, 0.55, 0.377792455436,
         0.231801948466, 0.13425421037],
    ),
    "LinearLR(o, 1.0, 0.0, 10)": (
        LinearSchedule(),
        [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    ),
    "StepLR(o, 3, 0.5)": (
        StepSchedule(step_size=3, gamma=0.5),
        [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125],
    ),
    "OneCycleLR(o, 1.0, total_steps=12, pct_start=0.5, div_factor=10, final_div_factor=100)": (
        OneCycleSchedule(pct_start=0.5, div_factor=10, final_div_factor=100),
        [0.1, 0.185942352531, 0.410942352531, 0.689057647469, 0.914057647469, 1.0,
         0.93307968919, 0.75025, 0.5005, 0.25075, 0.06792031081, 0.001],
    ),
    "SequentialLR(o, [LinearLR(o, 0.25, 1.0, 4), CosineAnnealingLR(o, 6)], [4])": (
        CosineSchedule(warmup=4, warmup_factor=0.25),
        [0.25, 0.4375, 0.625, 0.8125, 1.0, 0.933012701892, 0.75, 0.5, 0.25, 0.066987298108],
    ),
}  # fmt: skip


def list_factors(schedule: Schedule, *, epochs: int = 1, steps_per_epoch: int) -> list[float]:
    plan = plan_rates(schedule, epochs=epochs, steps_per_epoch=steps_per_epoch)
    return [plan.get_factor(e, batch) for e in range(epochs) for batch in range(steps_per_epoch)]


@pytest.mark.parametrize("call", TORCH)
def test_each_step_s_rate_is_torch_s(call: str) -> None:
    schedule, rates = TORCH[call]
    factors = list_factors(schedule, steps_per_epoch=len(rates))
    assert factors == pytest.approx(rates, abs=1e-11)


def test_epochs_are_counted_in_steps_of_the_run() -> None:
    schedule = StepSchedule(step_size=Epochs(1), gamma=0.5, warmup=Epochs(0.5), warmup_factor=0.5)
    factors = list_factors(schedule, epochs=3, steps_per_epoch=4)
    assert factors == [0.5, 0.75, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_a_rate_depends_on_the_step_alone() -> None:
    plan = plan_rates(OneCycleSchedule(), epochs=4, steps_per_epoch=5)
    once = [plan.get_factor(epoch, batch) for epoch in range(4) for batch in range(5)]
    again = [plan.get_factor(epoch, batch) for epoch in (3, 2, 1, 0) for batch in range(5)]
    assert again == once[15:] + once[10:15] + once[5:10] + once[:5]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("pct_start", [0, 0.3, 0.5, 1])
def test_a_cycle_of_a_few_steps_has_finite_factors(steps: int, pct_start: float) -> None:
    factors = list_factors(OneCycleSchedule(pct_start=pct_start), steps_per_epoch=steps)
    assert all(0 <= factor <= 1 and math.isfinite(factor) for factor in factors)


def test_a_plan_s_text_holds_all_that_decides_a_rate() -> None:
    schedule = StepSchedule(step_size=Epochs(30), warmup=5)
    plan = plan_rates(schedule, epochs=90, steps_per_epoch=10)
    assert str(plan) == (
        "step=warmup:5,warmup-factor:0,step-size:30epochs,gamma:0.1 over 900 steps"
    )


def test_schedules_are_read_by_their_names_and_settings() -> None:
    assert list_schedules() == ["constant", "cosine", "linear", "step", "one-cycle"]
    assert read_schedule("constant", {"warmup": 3}) == Schedule(warmup=3)
    assert read_schedule("one-cycle", {"pct-start": 0.5}) == OneCycleSchedule(pct_start=0.5)
    given: dict[str, Duration | float] = {"step-size": Epochs(2), "gamma": 0.5}
    assert read_schedule("step", given) == StepSchedule(step_size=Epochs(2), gamma=0.5)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sine", {}, "no learning-rate schedule 'sine'; choose from constant, cosine"),
        ("cosine", {"gamma": 0.1}, "cosine has no setting 'gamma'; it has warmup, warmup-factor"),
        ("step", {}, "step-size"),
        ("step", {"step-size": 0}, "step-size must be above 0"),
        ("step", {"step-size": 2.5}, "step-size must be above 0, a whole number of steps"),
        ("step", {"step-size": 1, "gamma": 2.0}, "gamma must be a number, from 0 to 1, not 2"),
        ("cosine", {"end-factor": math.nan}, "end-factor must be a number, at least 0"),
        ("cosine", {"end-factor": math.inf}, "end-factor must be a number, at least 0"),
        ("cosine", {"end-factor": Epochs(1)}, "end-factor must be a number"),
        ("cosine", {"warmup": -1}, "warmup must be at least 0"),
        ("one-cycle", {"warmup": 3}, "pct-start instead of a warmup"),
        ("one-cycle", {"div-factor": 0.0}, "div-factor must be a number, at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    name: str, settings: dict[str, Duration | float], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        read_schedule(name, settings)


def test_a_warmup_as_long_as_the_training_is_refused() -> None:
    with pytest.raises(UsageError, match=r"warmup of 10 steps must be shorter.*which has 10"):
        plan_rates(CosineSchedule(warmup=Epochs(2)), epochs=2, steps_per_epoch=5)
