"""Learning-rate schedules: the factor of the learning rate at each step of a training run.

Formulas and defaults are those of torch.optim.lr_scheduler, so that settings can be copied from
PyTorch.  A factor depends on the number of the step alone.  Therefore, a run that is resumed, or
that repeats lost steps, trains with the same rates.  The momentum does not change with the rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from splitonnx.errors import UsageError


@dataclass(frozen=True)
class Epochs:
    """A number of epochs, which may be a fraction, as a length of time in training."""

    count: float

    def __str__(self) -> str:
        return f"{self.count:g}epochs"


Duration = int | Epochs
"""A length of time in training: a number of steps, or a number of epochs."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A schedule that keeps the learning rate constant, and the base class of all others.

    During the first steps, ``warmup``, the factor increases linearly from ``warmup_factor`` to 1,
    as that of torch's LinearLR does.  The schedule itself begins after that.
    """

    warmup: Duration = 0
    warmup_factor: float = 0.0

    def __post_init__(self) -> None:
        _check_duration("warmup", self.warmup, is_positive=False)
        _check("warmup_factor", self.warmup_factor, upper=1)

    def get_factor(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """Return the factor after ``step`` steps of the schedule, which has ``steps`` in all."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Schedule):
    """A decrease from 1 to ``end_factor`` along half a cosine, like torch's CosineAnnealingLR."""

    end_factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("end_factor", self.end_factor)

    def get_factor(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """Return ``end + (1 - end) * (1 + cos(pi * step / steps)) / 2``."""
        return _anneal(1.0, self.end_factor, step / steps)


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(Schedule):
    """A linear decrease from 1 to ``end_factor``, like torch's LinearLR with that end factor."""

    end_factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("end_factor", self.end_factor)

    def get_factor(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """Return ``1 + (end - 1) * step / steps``."""
        return 1.0 + (self.end_factor - 1.0) * (step / steps)


@dataclass(frozen=True, kw_only=True)
class StepSchedule(Schedule):
    """A multiplication by ``gamma`` each time that ``step_size`` has passed, like torch's StepLR.

    ``step_size`` is a number of steps, or of epochs as ``Epochs(30)``.
    """

    step_size: Duration
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_duration("step_size", self.step_size, is_positive=True)
        _check("gamma", self.gamma, upper=1)

    def get_factor(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """Return ``gamma ** (step // step_size)``."""
        size: float = count_steps(self.step_size, steps_per_epoch)
        return float(self.gamma ** (step // max(1, size)))


@dataclass(frozen=True, kw_only=True)
class OneCycleSchedule(Schedule):
    """One increase to the learning rate and one decrease, like torch's OneCycleLR with cosines.

    The factor starts at ``1 / div_factor``, is 1 after the fraction ``pct_start`` of all steps, and
    ends at ``1 / (div_factor * final_div_factor)``.  The increase is the warmup; there is no other.
    """

    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup != 0:
            raise UsageError("one-cycle has a warmup of its own: set pct-start instead of a warmup")
        _check("pct_start", self.pct_start, upper=1)
        _check("div_factor", self.div_factor, lower=1)
        _check("final_div_factor", self.final_div_factor, lower=1)

    def get_factor(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """Return the factor on the cosine from the start to 1, or on that from 1 to the end."""
        start = 1.0 / self.div_factor
        top, last = self.pct_start * steps - 1, steps - 1
        if step <= top:
            return _anneal(start, 1.0, step / top) if top > 0 else 1.0
        return _anneal(1.0, start / self.final_div_factor, (step - top) / (last - top))


@dataclass(frozen=True, kw_only=True)
class RatePlan:
    """A schedule for a run of a known length.

    ``steps`` is the number of steps of the whole run.
    """

    schedule: Schedule
    steps: int
    steps_per_epoch: int

    def get_factor(self, epoch: int, batch: int) -> float:
        """Return the factor of the learning rate for a batch of an epoch; both count from 0."""
        step = epoch * self.steps_per_epoch + batch
        warmup = count_steps(self.schedule.warmup, self.steps_per_epoch)
        if step < warmup:
            start = self.schedule.warmup_factor
            return start + (1.0 - start) * (step / warmup)
        return self.schedule.get_factor(step - warmup, self.steps - warmup, self.steps_per_epoch)

    def __str__(self) -> str:
        return f"{describe_schedule(self.schedule)} over {self.steps} steps"


def plan_rates(schedule: Schedule, *, epochs: int, steps_per_epoch: int) -> RatePlan:
    """Fit a schedule to a run of ``epochs`` epochs.

    Raises:
        UsageError: the warmup is not shorter than the run.
    """
    steps = epochs * steps_per_epoch
    warmup = count_steps(schedule.warmup, steps_per_epoch)
    if warmup and warmup >= steps:
        raise UsageError(
            f"the warmup of {warmup} steps must be shorter than the training, which has {steps}"
        )
    return RatePlan(schedule=schedule, steps=steps, steps_per_epoch=steps_per_epoch)


def count_steps(duration: Duration, steps_per_epoch: int) -> int:
    """Return the number of steps in a length of time; a fraction of a step is rounded."""
    if isinstance(duration, Epochs):
        return math.floor(duration.count * steps_per_epoch + 0.5)
    return duration


_KINDS: Mapping[str, type[Schedule]] = {
    "constant": Schedule,
    "cosine": CosineSchedule,
    "linear": LinearSchedule,
    "step": StepSchedule,
    "one-cycle": OneCycleSchedule,
}


def list_schedules() -> list[str]:
    """List the names of the schedules."""
    return list(_KINDS)


def describe_schedule(schedule: Schedule) -> str:
    """Return a schedule as text: its name and all its settings."""
    name = next(name for name, kind in _KINDS.items() if kind is type(schedule))
    settings = (f"{_spell(f.name)}:{_show(getattr(schedule, f.name))}" for f in fields(schedule))
    return f"{name}={','.join(settings)}"


def read_schedule(name: str, settings: Mapping[str, Duration | float]) -> Schedule:
    """Build a schedule from its name and settings; missing settings get their defaults.

    Raises:
        UsageError: the schedule or a setting is unknown or missing, or a value is out of range.
    """
    kind = _KINDS.get(name)
    if kind is None:
        known = ", ".join(_KINDS)
        raise UsageError(f"there is no learning-rate schedule '{name}'; choose from {known}")
    own = {_spell(field.name): field.name for field in fields(kind)}
    for setting in settings:
        if setting not in own:
            raise UsageError(f"{name} has no setting '{setting}'; it has {', '.join(own)}")
    if kind is StepSchedule and "step-size" not in settings:
        raise UsageError("step needs its step-size in steps or epochs: step=step-size:30epochs")
    values = {own[setting]: value for setting, value in settings.items()}
    return kind(**values)  # type: ignore[arg-type]  # keys are checked, values by the class


def _anneal(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1.0 + math.cos(math.pi * fraction)) / 2.0


def _spell(name: str) -> str:
    return name.replace("_", "-")


def _show(value: Duration | float) -> str:
    return str(value) if isinstance(value, Epochs) else f"{value:g}"


def _check(name: str, value: float, *, lower: float = 0, upper: float = math.inf) -> None:
    allowed = f"from {lower:g} to {upper:g}" if upper < math.inf else f"at least {lower:g}"
    if isinstance(value, Epochs) or not lower <= value <= upper or value == math.inf:
        raise UsageError(f"{_spell(name)} must be a number, {allowed}, not {_show(value)}")


def _check_duration(name: str, value: Duration, *, is_positive: bool) -> None:
    count = value.count if isinstance(value, Epochs) else value
    is_counted = isinstance(value, Epochs | int)
    is_enough = count > 0 if is_positive else count >= 0
    if not is_counted or not is_enough or not count < math.inf:
        lowest = "above 0" if is_positive else "at least 0"
        raise UsageError(
            f"{_spell(name)} must be {lowest}, a whole number of steps or a number of epochs, "
            f"not {_show(value)}"
        )
