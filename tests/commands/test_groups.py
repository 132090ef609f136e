"""Groups of options: what the command line sees, and what a command gets."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from splitonnx.commands.groups import Group, list_given, make_parameter, spread


@dataclass(frozen=True, kw_only=True)
class Paint:
    colour: Annotated[str, typer.Option(help="Its colour.")]
    coats: Annotated[int, typer.Option("--coats", min=1)] = 2
    names: Annotated[list[str] | None, typer.Option("--name")] = None
    is_matt: Annotated[bool, typer.Option("--matt")] = False


LENGTHS = Group(
    parameters=[make_parameter("width", int, 1), make_parameter("height", int, 1)],
    make=lambda width, height: width * height,
)

got: list[object] = []


@spread
def decorate(
    house: str, floor: int = 0, *, paint: Paint, loud: bool = False, area: Annotated[int, LENGTHS]
) -> None:
    """Decorate a house."""
    got.append((house, floor, paint, loud, area))


def call(*arguments: str) -> object:
    got.clear()
    app = typer.Typer()
    app.command()(decorate)
    found = CliRunner().invoke(app, arguments)
    return got[0] if found.exit_code == 0 else found.output


def test_the_command_line_sees_the_fields_of_a_group_where_the_group_stands() -> None:
    names = list(signature(decorate).parameters)
    assert names == [
        "house", "floor", "colour", "coats", "names", "is_matt", "loud", "width", "height",
    ]  # fmt: skip
    assert signature(decorate).parameters["colour"].default is Parameter.empty
    assert signature(decorate).parameters["coats"].default == 2
    assert (decorate.__name__, decorate.__doc__) == ("decorate", "Decorate a house.")


def test_the_command_gets_one_value_for_a_group() -> None:
    assert call("mill", "--colour", "red", "--matt", "--width", "3") == (
        "mill", 0, Paint(colour="red", is_matt=True), False, 3,
    )  # fmt: skip
    assert call("mill", "--floor", "1", "--colour", "red", "--name", "a", "--name", "b") == (
        "mill", 1, Paint(colour="red", names=["a", "b"]), False, 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["mill"], "--colour"), (["mill", "--colour", "red", "--coats", "0"], "--coats")],
)
def test_what_typer_refuses_of_a_field_it_refuses_of_a_group(
    arguments: list[str], reason: str
) -> None:
    assert reason in str(call(*arguments))


def test_the_options_that_were_given_are_those_not_at_their_defaults() -> None:
    assert list_given(Paint(colour="red", coats=2, names=[])) == ["--colour"]
    assert list_given(Paint(colour="red", coats=3, is_matt=True)) == [
        "--colour", "--coats", "--is-matt",
    ]  # fmt: skip
