"""Words of a command line that would be ignored: options given twice, and empty values."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import AT, MODEL, Command


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--loss", "mse", "--loss", "l1"], "--loss is given twice, and takes one value"),
        (["-o", "a", "--bundle", "b"], "--bundle is given twice"),
        (["--check", "--no-check"], "--check is given twice"),
        (["--labels", ""], "--labels is empty; give it a value, or leave it out"),
        (["--freeze", "^a", "--freeze", ""], "--freeze is empty"),
        (["--at", ""], "--at is empty; give it a value"),
        (["--dim", "N=4", "--dim", "N=5"], "--dim N is given twice, as 4 and as 5"),
        (["--bind", "rate=1", "--bind", "rate=2"], "--bind rate is given twice"),
    ],
)
def test_what_would_be_ignored_is_refused(command: Command, words: list[str], told: str) -> None:
    assert told in command.fail("cut", MODEL, "--at", AT, *words, "-o", "bundle")


def test_an_empty_argument_is_named_as_in_the_help(command: Command) -> None:
    assert "MODEL is empty; give it a value" in command.fail("inspect", "")


def test_what_does_no_harm_twice_is_taken(command: Command) -> None:
    command.succeed("inspect", MODEL, "--json", "--json")


def test_an_unknown_option_is_still_told_as_such(command: Command, tmp_path: Path) -> None:
    assert "--nothing" in command.fail("cut", MODEL, "--nothing", "-o", tmp_path / "bundle")
