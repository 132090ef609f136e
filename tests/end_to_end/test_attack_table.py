"""``make attack`` tells what it saw and ends with 1 where a row does not hold."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from tests.attacks import __main__ as script
from tests.attacks import catalogue
from tests.attacks.verdicts import Attack, Ground, Outcome


def hold(ground: Ground) -> Outcome:
    return Outcome(seen="7 of 7 refused", held=True)


def fall(ground: Ground) -> Outcome:
    return Outcome(seen="SIGFPE", held=False)


def fail(ground: Ground) -> Outcome:
    raise TimeoutError("no answer")


Run = Callable[[Ground], Outcome]


@pytest.fixture
def run_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run_rows(*rows: Run, words: tuple[str, ...] = ()) -> int:
        attacks = [Attack(fault="F1", name=run.__name__, right="lives", run=run) for run in rows]
        monkeypatch.setattr(catalogue, "list_attacks", lambda **_: attacks)
        monkeypatch.setattr(sys, "path", sys.path[:])
        monkeypatch.setattr(sys, "argv", ["attacks", *words])
        monkeypatch.setenv("PYTHONPATH", "")
        return script.main()

    return run_rows


def test_all_rows_that_hold_end_well(
    run_rows: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_rows(hold, hold) == 0
    assert "7 of 7 refused" in (printed := capsys.readouterr().out)
    assert "2 held, 0 fell" in printed


@pytest.mark.parametrize("row", [fall, fail])
def test_one_row_that_falls_or_fails_ends_with_one_after_all_others(
    run_rows: Callable[..., int], capsys: pytest.CaptureFixture[str], row: Run
) -> None:
    assert run_rows(row, hold) == 1
    assert "1 held, 1 fell" in (printed := capsys.readouterr().out)
    assert ("SIGFPE" if row is fall else "not carried out: TimeoutError: no answer") in printed


def test_no_row_is_no_success(run_rows: Callable[..., int]) -> None:
    assert run_rows(hold, words=("--only", "F9")) == 1
    assert run_rows(hold, words=("--only", "F1")) == 0


def test_every_row_has_a_name_of_its_own_and_says_what_is_right() -> None:
    rows = catalogue.list_attacks(messages=1, seed=0)
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.right for row in rows)
    assert {row.fault for row in rows} >= {*(f"F{n}" for n in range(1, 10)), "W"}
