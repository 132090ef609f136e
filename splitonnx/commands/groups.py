"""Groups of command-line options that are passed to a command as one value.

A group is usually a dataclass: the command line has one option for each field, and the command
receives an instance.  This module does not define the names and help texts of options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of options, and the function ``make`` that combines their values into one value.

    ``parameters`` contains one parameter per option; see :func:`make_parameter`.
    """

    parameters: Sequence[Parameter]
    make: Callable[..., Any]


def make_parameter(name: str, annotation: Any, default: Any) -> Parameter:
    """Return a keyword-only function parameter that represents one option.

    ``annotation`` contains typer's settings for the option.
    """
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def group_fields(group: Any) -> Group:
    """Return a :class:`Group` with one option for each field of a dataclass."""
    hints = get_type_hints(group, include_extras=True)
    parameters = [
        make_parameter(
            field.name,
            hints[field.name],
            Parameter.empty if field.default is MISSING else field.default,
        )
        for field in fields(group)
    ]
    return Group(parameters=parameters, make=group)


def list_given(group: Any) -> list[str]:
    """List the names of the options in ``group`` whose values differ from the defaults."""
    return [
        f"--{field.name.replace('_', '-')}"
        for field in fields(group)
        if getattr(group, field.name) not in (field.default, [])
    ]


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that has one option for each field of its option groups.

    This function is a decorator.  A parameter of the decorated command is a group if it is
    annotated with a dataclass, or with ``Annotated`` and a :class:`Group`.  The options have the
    same order as the parameters.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: group for name, hint in hints.items() if (group := _find_group(hint))}
    parameters: list[Parameter] = []
    for parameter in signature(command).parameters.values():
        name = parameter.name
        if name in groups:
            parameters.extend(groups[name].parameters)
        else:
            parameters.append(make_parameter(name, hints[name], parameter.default))

    @wraps(command)
    def call(**given: Any) -> None:
        command(**_gather(given, groups))

    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _find_group(hint: Any) -> Group | None:
    if get_origin(hint) is Annotated:
        return next((extra for extra in get_args(hint) if isinstance(extra, Group)), None)
    return group_fields(hint) if is_dataclass(hint) else None


def _gather(given: Mapping[str, Any], groups: Mapping[str, Group]) -> dict[str, Any]:
    """Combine the values of each group into one value under the group's name."""
    gathered = dict(given)
    for name, group in groups.items():
        values = {parameter.name: gathered.pop(parameter.name) for parameter in group.parameters}
        gathered[name] = group.make(**values)
    return gathered
