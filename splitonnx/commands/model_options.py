"""Options that supply facts missing from a model's file, and functions that parse them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from splitonnx.errors import UsageError
from splitonnx.names import BatchNormMode, BatchNormModes

_PANEL = "What the model means"

DimOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dim",
        metavar="NAME=SIZE",
        help="Fix a symbolic size of the inputs, such as T=128; or name one that is fixed, such as "
        "x:0=N; repeatable.",
        rich_help_panel=_PANEL,
    ),
]
BindOption = Annotated[
    list[str] | None,
    typer.Option(
        "--bind",
        metavar="INPUT=VALUE",
        help="An input that always has this value, such as rate=16000: a number, or numbers with "
        "commas; repeatable.",
        rich_help_panel=_PANEL,
    ),
]
DequantizeOption = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        help="Turn a quantized model's arithmetic with integers, which has no gradient, into "
        "arithmetic with floats.",
        rich_help_panel=_PANEL,
    ),
]


StateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--state",
        metavar="OUT=IN",
        help="An output that the model reads as an input in the next step, such as h_n=h_0; "
        "training keeps it, and it is not part of the data; repeatable.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options that supply facts missing from a model's file."""

    dim: DimOption = None
    bind: BindOption = None
    dequantize: DequantizeOption = False
    batchnorm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[REGEX=]MODE",
            help="train (batch statistics) or frozen (the running ones), for all or where REGEX "
            "finds the name; by default as the model says; repeatable, the last one applies.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    tie: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A=B",
            help="Two parameters of equal numbers, or one transposed, that are one; repeatable.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    stop_gradient: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A tensor through which no gradient passes, as behind detach(); repeatable.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    state: StateOption = None
    class_axis: Annotated[
        int | None,
        typer.Option(
            metavar="AXIS",
            help="The axis of the scores that holds the classes; 1 by default, or the last if only "
            "its size is known.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    labels: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The name of the labels in the data.", rich_help_panel=_PANEL
        ),
    ] = "labels"

    def read_batchnorm(self) -> BatchNormModes:
        """Return one mode for all BatchNormalization nodes, or a mode for each regular expression.

        Return ``None`` if ``--batchnorm`` was not used.

        Raises:
            UsageError: a value of ``--batchnorm`` has the wrong form.
        """
        modes: dict[str, BatchNormMode] = {}
        for text in self.batchnorm or ():
            pattern, _, mode = text.rpartition("=")
            if mode not in ("train", "frozen") or text.startswith("="):
                raise UsageError(
                    f"--batchnorm {text}: say train or frozen, or REGEX=train or REGEX=frozen"
                )
            modes.pop(pattern, None)  # the last one applies
            modes[pattern] = "train" if mode == "train" else "frozen"
        return modes[""] if list(modes) == [""] else modes or None

    def read_ties(self) -> list[tuple[str, str]]:
        """Return pairs of parameter names; the two parameters of a pair are treated as one.

        Raises:
            UsageError: a value of ``--tie`` does not have the form ``A=B``.
        """
        return [_part("--tie", text, "A=B") for text in self.tie or ()]


def read_states(given: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return pairs of an output and an input from ``--state`` options such as ``h_n=h_0``.

    Raises:
        UsageError: an option does not have the form ``OUT=IN``.
    """
    return [_part("--state", text, "OUT=IN") for text in given or ()]


@dataclass(frozen=True, kw_only=True)
class MeasuredCut:
    """The options for a cut whose memory is estimated."""

    at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A cut, as for cut, whose memory is estimated; repeatable."
        ),
    ] = None
    tail_at: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Its second end, as for cut; repeatable."),
    ] = None
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size of that estimate; 1 by default.")
    ] = None

    def check(self) -> None:
        """Check that a cut is named if anything is said of it.

        Raises:
            UsageError: its second end or its batch size is given alone.
        """
        if not self.at and (self.tail_at or self.batch):
            raise UsageError("--tail-at and --batch are for a cut's memory; name the cut with --at")


def read_dims(given: Sequence[str] | None) -> dict[str, int | str]:
    """Return the sizes of inputs from ``--dim`` options such as ``T=128`` or ``x:0=N``.

    The dictionary's keys are the parts before the equals signs.

    Raises:
        UsageError: an option does not have this form, or two of them contradict each other.
    """
    pairs = [_part("--dim", text, "NAME=SIZE") for text in given or ()]
    _refuse_contradictions("--dim", pairs)
    return {name: int(size) if _is_integer(size) else size for name, size in pairs}


def read_bindings(given: Sequence[str] | None) -> dict[str, list[float | int | bool]]:
    """Return the values of inputs from ``--bind`` options such as ``mean=0.1,0.2``.

    The dictionary's keys are the names of the inputs.

    Raises:
        UsageError: an option does not have this form, or a value is neither a number nor ``true``
            or ``false``, or two options contradict each other.
    """
    pairs = [_part("--bind", text, "INPUT=VALUE") for text in given or ()]
    _refuse_contradictions("--bind", pairs)
    return {name: [_read_number(name, text) for text in value.split(",")] for name, value in pairs}


def _part(option: str, text: str, form: str) -> tuple[str, str]:
    name, _, value = text.rpartition("=")
    if not name or not value:
        raise UsageError(f"{option} {text}: write it as {form}")
    return name, value


def _refuse_contradictions(option: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse two different values for one name, because only the last would be used."""
    first: dict[str, str] = {}
    for name, value in pairs:
        if first.setdefault(name, value) != value:
            raise UsageError(
                f"{option} {name} is given twice, as {first[name]} and as {value}; leave one out"
            )


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _read_number(name: str, text: str) -> float | int | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _is_integer(text):
        return int(text)
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--bind {name}: '{text}' is not a number, true or false") from error
