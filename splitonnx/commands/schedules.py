"""Options for the learning-rate schedule of a training run, and functions that parse them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from splitonnx.errors import UsageError
from splitonnx.schedules import Duration, Epochs, Schedule, read_schedule

_DURATIONS = frozenset({"step-size", "warmup"})


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The options for the learning-rate schedule of a training run."""

    lr_schedule: Annotated[
        str | None,
        typer.Option(
            "--lr-schedule",
            metavar="NAME[=SETTING:VALUE,...]",
            help="How the learning rate changes: constant, cosine, linear, step or one-cycle, with "
            "torch's settings, such as step=step-size:30epochs,gamma:0.1.",
            show_default=False,
        ),
    ] = None
    warmup: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTH",
            help="Increase the learning rate linearly from 0 at first: a number of steps, or of "
            "epochs such as 0.5epochs.",
            show_default=False,
        ),
    ] = None

    def read(self) -> Schedule | None:
        """Return the schedule, or ``None`` if no option was given.

        Raises:
            UsageError: an option is malformed, or a value is out of range.
        """
        if self.lr_schedule is None and self.warmup is None:
            return None
        name, settings = _part("constant" if self.lr_schedule is None else self.lr_schedule)
        if self.warmup is not None:
            if "warmup" in settings:
                raise UsageError("--warmup and the warmup of --lr-schedule exclude each other")
            settings["warmup"] = _read_duration("--warmup", self.warmup)
        return read_schedule(name, settings)


def _part(text: str) -> tuple[str, dict[str, Duration | float]]:
    name, mark, rest = text.partition("=")
    settings: dict[str, Duration | float] = {}
    for item in rest.split(",") if mark else ():
        setting, colon, value = item.partition(":")
        if not setting or not colon or setting in settings:
            raise UsageError(
                f"--lr-schedule {text}: write it as NAME=SETTING:VALUE,..., each setting once"
            )
        where = f"--lr-schedule {setting}"
        is_duration = setting in _DURATIONS
        settings[setting] = (_read_duration if is_duration else _read_number)(where, value)
    return name, settings


def _read_duration(option: str, text: str) -> Duration:
    for ending in ("epochs", "epoch"):
        if text.endswith(ending):
            return Epochs(_read_number(option, text.removesuffix(ending)))
    if not text.isascii() or not text.isdecimal():
        raise UsageError(
            f"{option} {text}: write a number of steps, or of epochs such as 0.5epochs"
        )
    return int(text)


def _read_number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"{option} {text}: write a number") from error
