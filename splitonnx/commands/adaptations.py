"""The command that adds low-rank adapters to a model: adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import splitonnx
from splitonnx.commands import printing
from splitonnx.commands.files import refuse_existing
from splitonnx.commands.logs import escape
from splitonnx.commands.options import ForceOption, ModelArgument, QuietOption
from splitonnx.errors import count_some


def adapt(
    model: ModelArgument,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The model to write.", show_default=False
        ),
    ],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX",
            help="Weights that get an adapter: those whose name it finds, or the name of a MatMul "
            "or Gemm node that uses them; repeatable.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of the adapters.", show_default="8"),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="The adapters' product is multiplied by alpha / rank; by default alpha is the "
            "rank.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of new adapters.")] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Put the adapters of this safetensors file into the model, instead of new ones.",
            show_default=False,
        ),
    ] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Add low-rank adapters (LoRA) to a model, which cut and train then train alone.

    With --adapters, put saved adapters into the model that they were trained with.
    """
    refuse_existing(output, force=force)
    adapted = splitonnx.write_adapted(
        model,
        output,
        lora=lora or (),
        rank=rank,
        alpha=alpha,
        seed=seed,
        adapters=adapters,
        overwrite=force,
    )
    if not quiet:
        count = len(adapted.weights)
        told = (
            f"{count} {'adapter' if count == 1 else 'adapters'} with {adapted.parameters:,} "
            f"parameters, for {count_some(adapted.weights)}"
        )
        print(escape(told))
        printing.print_written(output, adapted.size)
