"""Words of a command line that would be ignored: options given twice, and empty values."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import AT, MODEL, Command


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lr", "1", "--lr", "2"], "--lr is given twice, and takes one value"),
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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--give-up-after", "3"], "--local and --give-up-after exclude each other"),
        (["--checkpoint-every", "5"], "--local and --checkpoint-every exclude each other"),
        (["--when-unsaved", "continue"], "--local and --when-unsaved exclude each other"),
        (["--lr", "inf"], "--lr must be at least 0 and finite, not inf"),
    ],
)
def test_a_local_training_refuses_what_it_would_ignore(
    command: Command, data: Path, words: list[str], told: str
) -> None:
    assert told in command.fail("train", MODEL, "--local", "--data", data, *words)


def test_the_folder_of_the_other_kind_is_told_apart(
    command: Command, bundle: Path, data: Path
) -> None:
    server = ["--data", data, "--server", "ws://localhost:1"]
    assert "name the folder of one party in it" in command.fail("train", bundle, *server)
    assert "this is the server's part" in command.fail("train", bundle / "server", *server)
    assert "of the whole bundle, above it" in command.fail("merge", bundle / "client", "-o", "m")


def test_a_port_out_of_range_is_a_bad_address(command: Command, bundle: Path, data: Path) -> None:
    line = command.fail("train", bundle / "client", "--data", data, "--server", "ws://a:99999")
    assert "'ws://a:99999' is not a websocket address: Port out of range" in line


def test_processes_for_owners_need_isolation(command: Command, bundle: Path) -> None:
    line = command.fail("serve", bundle / "server", "--no-isolate", "--max-workers", "3")
    assert "--no-isolate and --max-workers exclude each other" in line
