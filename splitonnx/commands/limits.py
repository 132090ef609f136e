"""The ``--max-...`` options of ``serve``, one for each limit of a server."""

from __future__ import annotations

import re
from inspect import Parameter
from typing import Annotated, Any

import typer

from splitonnx.commands.groups import Group, make_parameter
from splitonnx.errors import UsageError
from splitonnx.runtime.limits import LimitHelp, Limits, list_limits

PREFIX = "max_"


def _make_option(limit: LimitHelp) -> Parameter:
    names = [limit.name, limit.earlier] if limit.earlier else [limit.name]
    option = typer.Option(
        *(f"--{PREFIX}{name}".replace("_", "-") for name in names),
        help=f"{limit.text}; {limit.unset} by default." if limit.unset else f"{limit.text}.",
        rich_help_panel="Limits",
        show_default=not limit.unset,
    )
    return make_parameter(PREFIX + limit.name, Annotated[limit.type, option], limit.default)


def make_limits(**given: Any) -> Limits:
    """Build a server's limits from the values of the options.

    Raises:
        UsageError: a value is out of range, or two contradict each other; the error names the
            options.
    """
    try:
        return Limits(**{name.removeprefix(PREFIX): value for name, value in given.items()})
    except UsageError as error:
        raise UsageError(_name_options(str(error))) from error


def _name_options(sentence: str) -> str:
    """Write the options of ``serve`` in place of the names of limits."""
    names = "|".join(limit.name for limit in list_limits())
    return re.sub(
        rf"\b(?:limit )?({names})\b",
        lambda found: f"--{PREFIX}{found[1]}".replace("_", "-"),
        sentence,
    )


LIMITS = Group(parameters=[_make_option(limit) for limit in list_limits()], make=make_limits)
"""The group of options, with one option per limit."""
