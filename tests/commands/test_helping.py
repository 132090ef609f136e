"""How ``--help`` looks, and the version."""

from __future__ import annotations

import shlex
from importlib.metadata import version

import pytest

from splitonnx.commands import app
from splitonnx.commands.helping import EXAMPLES
from tests.support.commands import Command

NAMES = [str(command.name or command.callback.__name__) for command in app.registered_commands
         if command.callback is not None]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_command_shows_an_example_of_options_that_it_has(name: str, command: Command) -> None:
    shown = " ".join(command.succeed(name, "--help").split())
    assert f"Example: {EXAMPLES[name]}" in shown
    for word in shlex.split(EXAMPLES[name]):
        assert not word.startswith("-") or shown.count(word) >= 2, word


@pytest.mark.parametrize("name", [None, *NAMES])
def test_no_switch_shows_a_type(name: str | None, command: Command) -> None:
    shown = command.succeed(*([] if name is None else [name]), "--help").lower()
    assert "bool" not in shown


@pytest.mark.parametrize(
    ("name", "long"), [("cut", "--bundle"), ("predict", "--output"), ("merge", "--output")]
)
def test_what_is_written_is_named_by_a_long_option_too(
    name: str, long: str, command: Command
) -> None:
    shown = " ".join(command.succeed(name, "--help").split())
    assert f" {long} -o " in shown


def test_the_version_is_that_of_the_installed_package(command: Command) -> None:
    assert command.succeed("--version").strip() == f"splitonnx {version('splitonnx')}"
