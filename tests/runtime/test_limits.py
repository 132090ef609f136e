"""Limits: their documentation, their options, and what is refused."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import pytest

from splitonnx.commands.services import serve
from splitonnx.errors import UsageError
from splitonnx.runtime.limits import Limits, list_limits, measure_memory
from tests.support.limits_page import PAGE, render_table, replace_table


def test_the_page_has_the_table_of_all_limits() -> None:
    page = PAGE.read_text()
    assert page == replace_table(page), "write it: python -m tests.support.limits_page"
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    assert [field.name for field in fields(Limits)] == [row for row in rows if row != "limit"]


def test_a_table_that_is_out_of_date_is_replaced_and_nothing_around_it() -> None:
    table = render_table()
    old = table.replace("| 128 |", "| 127 |")
    assert old != table
    assert replace_table(f"before\n\n{old}\nafter\n") == f"before\n\n{table}\nafter\n"


def test_what_users_are_told_of_a_limit_is_a_phrase_for_the_option_and_the_page() -> None:
    for limit in list_limits():
        assert limit.text[0].isupper(), limit
        assert limit.text[-1].isalnum(), limit
        assert limit.beyond, limit
        assert (limit.default is None) == bool(limit.unset), limit


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
