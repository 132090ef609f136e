"""Options that say which losses to train with, and the functions that parse them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from splitonnx.commands.groups import list_given
from splitonnx.commands.options import RECIPE_PANEL
from splitonnx.errors import UsageError
from splitonnx.losses import CROSS_ENTROPY, Loss

_FORM = "cross-entropy,output=logits,weight=0.5"


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The losses, and the settings of a single one."""

    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,SETTING=VALUE...]",
            help="cross-entropy (default), mse, l1, bce-with-logits or from-model, or an .onnx "
            f"file of your own; with settings, as {_FORM}; repeatable, to add several up.",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = None
    label_smoothing: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            help="The part of each label that is spread over all classes.",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = None
    class_weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...|FILE",
            help="A weight for each class: numbers with commas, or a .npy or .txt file.",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = None
    ignore_index: Annotated[
        int | None,
        typer.Option(
            metavar="LABEL",
            help="The label that does not count, such as -100.",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = None
    sample_weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The array of the data that holds a weight for each sample.",
            rich_help_panel=RECIPE_PANEL,
        ),
    ] = None

    def read_chosen(self) -> Loss | list[Loss] | None:
        """Return the losses that the options describe, or ``None`` if no option was given.

        Raises:
            UsageError: see :meth:`read_losses`.
        """
        return self.read_losses() if list_given(self) else None

    def read_losses(self) -> Loss | list[Loss]:
        """Return the losses that the options describe.

        Raises:
            UsageError: an option has the wrong form, or does not say which of several losses it is
                for.
        """
        losses = [read_loss(text) for text in self.loss or [CROSS_ENTROPY]]
        given = {
            "label_smoothing": self.label_smoothing,
            "class_weights": None
            if self.class_weights is None
            else read_numbers("--class-weights", self.class_weights, ","),
            "ignore_index": self.ignore_index,
            "sample_weights": self.sample_weights,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        if settings and len(losses) > 1:
            option = _spell(next(iter(settings)))
            raise UsageError(
                f"--{option} does not say which loss it is for; write it into the loss, as in "
                f"--loss {losses[0].kind},{option}=..."
            )
        if settings:
            own = [name for name in settings if getattr(losses[0], name) not in (None, (), 0.0)]
            if own:
                raise UsageError(f"--{_spell(own[0])} is given twice; leave one out")
            losses = [_make_loss(_describe(losses[0]) | settings)]
        return losses[0] if len(losses) == 1 else losses


def read_loss(text: str) -> Loss:
    """Return the loss that a value of ``--loss`` describes.

    Raises:
        UsageError: the text does not have the form of :data:`_FORM`, or a setting is unknown, has
            no such value, or is given twice.
    """
    kind, *parts = text.split(",")
    settings: dict[str, Any] = {"kind": kind}
    for part in parts:
        option, equals, value = part.partition("=")
        name = option.replace("-", "_")
        if not equals or not value or option not in _SETTINGS:
            known = ", ".join(_SETTINGS)
            raise UsageError(
                f"--loss {text}: '{part}' is not a setting; write it as {_FORM}, with {known}"
            )
        if name in settings:
            raise UsageError(f"--loss {text}: {option} is given twice; leave one out")
        settings[name] = _SETTINGS[option](f"--loss {text}: {option}", value)
    return _make_loss(settings)


def _describe(loss: Loss) -> dict[str, Any]:
    return {name: getattr(loss, name) for name in loss.__struct_fields__}


def _make_loss(settings: Mapping[str, Any]) -> Loss:
    return Loss(**settings)


def _spell(name: str) -> str:
    return name.replace("_", "-")


def read_numbers(option: str, text: str, separator: str) -> tuple[float, ...]:
    """Return the numbers in a text, or in the ``.npy`` or ``.txt`` file that it names.

    Raises:
        UsageError: a part is not a number, or the file cannot be read or holds something else.
    """
    path = Path(text)
    if path.suffix not in (".npy", ".txt"):
        return tuple(_read_float(option, part) for part in text.split(separator))
    import numpy as np

    try:
        if path.suffix == ".txt":
            words = path.read_text("utf-8").replace(",", " ").split()
            return tuple(_read_float(option, word) for word in words)
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{option}: {path} cannot be read: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "fiu":
        raise UsageError(f"{option}: {path} holds {array.dtype}{list(array.shape)}, not a vector")
    return tuple(map(float, array))


def _read_float(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"{option}: '{text}' is not a number") from error


def _read_integer(option: str, text: str) -> int:
    if not text.removeprefix("-").isdecimal():
        raise UsageError(f"{option}: '{text}' is not an integer")
    return int(text)


def _read_name(option: str, text: str) -> str:
    return text


def _read_weights(option: str, text: str) -> tuple[float, ...]:
    return read_numbers(option, text, ":")


_SETTINGS: Mapping[str, Callable[[str, str], object]] = {
    "output": _read_name,
    "labels": _read_name,
    "class-axis": _read_integer,
    "label-smoothing": _read_float,
    "class-weights": _read_weights,
    "ignore-index": _read_integer,
    "sample-weights": _read_name,
    "weight": _read_float,
    "name": _read_name,
}
