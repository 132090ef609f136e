"""Limits: their documentation, their options, and what is refused."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from splitonnx.commands.services import serve
from splitonnx.errors import UsageError
from splitonnx.runtime.limits import Limits, measure_memory

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
UNSET = {"half of the machine's": None, "a quarter of the machine's memory": None, "none": None}


def test_the_page_lists_every_limit_with_its_default() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE))
    for field in fields(Limits):
        default = field.default
        told = UNSET.get(rows[field.name], rows[field.name])
        assert told == (default if default is None else f"{default:.0f}"), field.name


def test_every_limit_is_an_option_with_the_same_default() -> None:
    options = inspect.signature(serve).parameters
    for field in fields(Limits):
        assert options[f"max_{field.name}"].default == field.default
    assert len([name for name in options if name.startswith("max_")]) == len(fields(Limits))


@pytest.mark.parametrize(
    "setting",
    [{"clients": 0}, {"idle_seconds": -1.0}, {"norm": 0.0}, {"norm": float("nan")},
     {"login_seconds": float("inf")}, {"memory_bytes": 0}],
)  # fmt: skip
def test_a_limit_that_limits_nothing_or_everything_is_refused(setting: dict[str, float]) -> None:
    (name,) = setting
    with pytest.raises(UsageError, match=f"limit {name} must be positive"):
        Limits(**setting)  # type: ignore[arg-type]


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="larger than message_bytes"):
        Limits(unauthenticated_bytes=2000, message_bytes=1000)
    with pytest.raises(UsageError, match="larger than idle_seconds"):
        Limits(message_seconds=20, idle_seconds=10)


def test_memory_is_half_of_the_machine_s_unless_said() -> None:
    assert Limits().memory == measure_memory() // 2 > 0
    assert Limits(memory_bytes=10).memory == 10
