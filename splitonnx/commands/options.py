"""Options that several commands share, and checks of their combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitonnx import names
from splitonnx.commands.logs import LogFormat, LogLevel
from splitonnx.errors import UsageError
from splitonnx.optimizers import Optimizer, ParameterGroup, read_optimizer

if TYPE_CHECKING:
    from splitonnx.runtime.client.datasets import Dataset


class Dropout(StrEnum):
    """The values that ``--dropout`` accepts."""

    KEEP = "keep"
    OFF = "off"


class Target(StrEnum):
    """The values that ``--client-target`` and ``--server-target`` accept."""

    PORTABLE = names.PORTABLE
    TRAINING = names.TRAINING


class Recomputing(StrEnum):
    """The values that ``--recompute`` accepts."""

    CLIENT = "client"
    SERVER = "server"
    BOTH = "both"


RECIPE_PANEL = "What is trained, and how"
"""The heading of these options in the help."""
_GROUP_SETTINGS = ("lr-factor", "weight-decay")

OutputOption = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="NAME",
        help="The model output that the loss is taken of; the first by default.",
        rich_help_panel=RECIPE_PANEL,
    ),
]
OptimizerOption = Annotated[
    str | None,
    typer.Option(help="sgd, adam or adamw (default).", rich_help_panel=RECIPE_PANEL),
]
GiveUpAfterOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="SECONDS",
        help="How long to try to reach the server; by default the first time once, then forever.",
        show_default=False,
    ),
]
LearningRateOption = Annotated[
    float | None, typer.Option("--lr", help="Learning rate.", rich_help_panel=RECIPE_PANEL)
]
MomentumOption = Annotated[
    float | None, typer.Option(help="Momentum of sgd.", rich_help_panel=RECIPE_PANEL)
]
WeightDecayOption = Annotated[
    float | None, typer.Option(help="Weight decay.", rich_help_panel=RECIPE_PANEL)
]
ClipNormOption = Annotated[
    float | None,
    typer.Option(help="Clip gradients to this global norm.", rich_help_panel=RECIPE_PANEL),
]
ParamGroupOption = Annotated[
    list[str] | None,
    typer.Option(
        "--param-group",
        metavar="REGEX=SETTING:VALUE,...",
        help="A learning-rate factor or weight decay of its own where REGEX finds the parameter's "
        "name, such as bias$=lr-factor:0.1,weight-decay:0; repeatable, the last one applies.",
        rich_help_panel=RECIPE_PANEL,
    ),
]
MetricOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="What an evaluation computes, too: accuracy, top-K, f1, precision, recall, auc, "
        "perplexity, mae, mse or rmse; of a loss with a name, f1.NAME; repeatable.",
        show_default=False,
    ),
]
DropoutOption = Annotated[
    Dropout | None,
    typer.Option(help="On or off; by default as the model says.", rich_help_panel=RECIPE_PANEL),
]
TrainOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Train what it finds: parameters in spite of --freeze, or constants that would "
        "not be trained; repeatable.",
        rich_help_panel=RECIPE_PANEL,
    ),
]
FreezeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Parameters whose name it finds keep their value; repeatable.",
        rich_help_panel=RECIPE_PANEL,
    ),
]
CheckOption = Annotated[
    bool | None,
    typer.Option(
        "--check/--no-check",
        help="Compare what is trained with the model, on random inputs; by default up to 64 MiB of "
        "weights.",
        show_default=False,
        rich_help_panel=RECIPE_PANEL,
    ),
]
WireOption = Annotated[
    str | None,
    typer.Option(
        "--wire",
        metavar="CODEC",
        help="Encode what crosses the cut: fp16, bf16, int8, int4, topk=0.1 or randtopk=0.1; or "
        "each direction its own way, as fwd=int8,bwd=bf16.",
        show_default=False,
        rich_help_panel=RECIPE_PANEL,
    ),
]
RecomputeOption = Annotated[
    Recomputing | None,
    typer.Option(
        help="Whose forward stage runs again before its backward stage, in place of keeping what "
        "the gradients are computed from: less memory, the same results, one more forward stage.",
        show_default=False,
        rich_help_panel=RECIPE_PANEL,
    ),
]
ClientTargetOption = Annotated[
    Target | None,
    typer.Option(
        help="ORT's fused gradient kernels (training, default) or standard operators for any "
        "ONNX Runtime (portable).",
        rich_help_panel=RECIPE_PANEL,
    ),
]
ServerTargetOption = Annotated[
    Target | None, typer.Option(help="The same for the server.", rich_help_panel=RECIPE_PANEL)
]

ModelArgument = Annotated[Path, typer.Argument(help="The ONNX model.")]
BundleArgument = Annotated[Path, typer.Argument(help="The bundle's folder.")]
DataOption = Annotated[
    Path,
    typer.Option(
        help="An .npz file, a folder of .npy files, or a folder with one .npz file per batch; "
        "arrays named as the model's inputs, and 'labels'."
    ),
]
ServerOption = Annotated[
    str | None, typer.Option(metavar="URL", help="The server, such as ws://127.0.0.1:8765.")
]
BATCH_SIZE = 32
"""The default number of samples in a step."""
BatchSizeOption = Annotated[
    int | None, typer.Option(min=1, help="Samples a step.", show_default=str(BATCH_SIZE))
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of shuffling and dropout.")]
TrustedOption = Annotated[
    bool,
    typer.Option(
        "--trusted",
        help="You trust who made the folder as you do your programs: take graphs in ORT format.",
    ),
]
ShareOption = Annotated[
    bool,
    typer.Option(
        "--share",
        help="Permit the server to join what its clients learn: send it this part's weights if its "
        "policy asks for them.",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads of one operator; all cores by default.")
]
ProviderOption = Annotated[
    str,
    typer.Option(
        metavar="NAME[:DEVICE]",
        help="What computes this part: cpu, cuda, openvino, coreml or dml; other than cpu for "
        "portable parts only.",
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite existing output.")]
RawStatesOption = Annotated[
    bool,
    typer.Option("--raw-states", help="Also write the last values of states that hold raw inputs."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout, for scripts.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
LogFormatOption = Annotated[
    LogFormat, typer.Option(help="Lines for people, or one JSON object a line.")
]
LogLevelOption = Annotated[
    LogLevel | None, typer.Option(help="Log messages of this level and above; info by default.")
]


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """The options that determine which messages a command logs, and in which format."""

    quiet: QuietOption = False
    log_format: LogFormatOption = LogFormat.TEXT
    log_level: LogLevelOption = None

    def choose_level(self) -> LogLevel:
        """Return the lowest level at which messages are logged.

        Raises:
            UsageError: the options contradict each other.
        """
        refuse_both("--quiet", "--log-level", self.quiet, self.log_level)
        return LogLevel.ERROR if self.quiet else self.log_level or LogLevel.INFO


def make_optimizer(
    name: str | None,
    *,
    lr: float | None,
    momentum: float | None,
    weight_decay: float | None,
    clip_norm: float | None,
    groups: Sequence[str] | None = None,
) -> Optimizer:
    """Build an optimizer from command-line options; options that are ``None`` get their defaults.

    ``groups`` are the values of ``--param-group``.

    Raises:
        UsageError: the optimizer is unknown or lacks an option that was given, or a value is
            malformed or out of range.
    """
    settings = {
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
    }
    given = {key: value for key, value in settings.items() if value is not None}
    optimizer = read_optimizer({"name": name or "adamw", **given})
    return replace(optimizer, groups=read_groups(groups))


def read_groups(given: Sequence[str] | None) -> tuple[ParameterGroup, ...]:
    """Return the parameter groups from ``--param-group`` options.

    Raises:
        UsageError: an option is malformed, or a value is out of range.
    """
    return tuple(_read_group(text) for text in given or ())


def _read_group(text: str) -> ParameterGroup:
    pattern, _, rest = text.rpartition("=")
    settings: dict[str, float] = {}
    for item in rest.split(","):
        setting, _, value = item.partition(":")
        if not pattern or setting in settings or setting not in _GROUP_SETTINGS:
            raise UsageError(
                f"--param-group {text}: write it as REGEX=lr-factor:NUMBER,weight-decay:NUMBER, or "
                "with one of the two"
            )
        try:
            settings[setting] = float(value)
        except ValueError as error:
            raise UsageError(
                f"--param-group {text}: '{value}' is not a number, for {setting}"
            ) from error
    return ParameterGroup(
        pattern=pattern,
        lr_factor=settings.get("lr-factor", 1.0),
        weight_decay=settings.get("weight-decay"),
    )


def refuse_both(first: str, second: str, *given: object) -> None:
    """Raise an error if two mutually exclusive options were both given.

    ``first`` and ``second`` are the names of the options, and ``given`` are their values.

    Raises:
        UsageError: both options were given; the message contains their names.
    """
    if all(given):
        raise UsageError(f"{first} and {second} exclude each other")


def choose_batch_size(given: int | None, *datasets: Dataset) -> int:
    """Return the batch size that was given, or the default.

    Raises:
        UsageError: a batch size was given, but every dataset determines its own.
    """
    if given is not None and all(dataset.has_own_batches for dataset in datasets):
        raise UsageError(
            "--batch-size has no effect on a folder with one .npz file per batch; leave it out"
        )
    return BATCH_SIZE if given is None else given
