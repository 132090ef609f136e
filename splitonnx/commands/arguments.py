"""Refuse command lines in which an option is given twice or has an empty value.

If an option that takes one value is given twice, the parser silently uses only the last value.  An
empty value usually comes from a variable in a script that is not set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from splitonnx.errors import UsageError


def refuse_ignored(command: Any, context: Any, words: Sequence[str]) -> None:
    """Check the words of a command line before they are converted to values.

    Raises:
        UsageError: an option that takes one value is given twice, or a value is empty.
    """
    values, _, order = command.make_parser(context).parse_args(args=list(words))
    _refuse_repeated(order)
    _refuse_empty(order, values)


def _refuse_repeated(order: Sequence[Any]) -> None:
    for parameter, count in Counter(order).items():
        if count > 1 and parameter.param_type_name == "option" and not _takes_several(parameter):
            raise UsageError(f"{_name(parameter)} is given twice, and takes one value")


def _takes_several(option: Any) -> bool:
    """Return whether it is of use, or does no harm, to give an option more than once."""
    is_switch = option.is_flag and not option.secondary_opts
    return bool(is_switch or option.multiple)


def _refuse_empty(order: Sequence[Any], values: Mapping[str, Any]) -> None:
    for parameter in dict.fromkeys(order):
        value = values.get(parameter.name)
        held = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(each, str) and not each for each in held):
            advice = "" if parameter.required else ", or leave it out"
            raise UsageError(f"{_name(parameter)} is empty; give it a value{advice}")


def _name(parameter: Any) -> str:
    """Return the name of an option or argument as the user types it or the help shows it."""
    if parameter.param_type_name == "option":
        return str(max(parameter.opts, key=len))
    return str(parameter.metavar or parameter.name.upper())
