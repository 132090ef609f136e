"""The command that trains: split against a server, or the whole model as the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import splitonnx
from splitonnx.commands import printing, security
from splitonnx.commands.files import refuse_existing
from splitonnx.commands.options import (
    BatchNormOption,
    BatchSizeOption,
    ClientTargetOption,
    ClipNormOption,
    DataOption,
    DropoutOption,
    ForceOption,
    FreezeOption,
    GiveUpAfterOption,
    JsonOption,
    LossOption,
    MomentumOption,
    OptimizerOption,
    OutputOption,
    QuietOption,
    SeedOption,
    ServerOption,
    Target,
    ThreadsOption,
    TrainOption,
    TrustedOption,
    WeightDecayOption,
    make_optimizer,
    refuse_both,
)
from splitonnx.errors import UsageError

if TYPE_CHECKING:
    from splitonnx.bundles import Bundle


CHECKPOINT_EVERY = 100
"""Steps between two checkpoints, unless said otherwise."""


class WhenUnsaved(StrEnum):
    """Choices of ``--when-unsaved``."""

    STOP = "stop"
    CONTINUE = "continue"


def train(
    source: Annotated[
        Path,
        typer.Argument(help="The client's folder, or with --local an ONNX model."),
    ],
    data: DataOption,
    server: ServerOption = None,
    local: Annotated[
        bool, typer.Option("--local", help="Train a whole model here, without a cut.")
    ] = False,
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out data, evaluated after each epoch.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Times through the data.")] = 1,
    batch_size: BatchSizeOption = 32,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Learning rate, in place of the bundle's.")
    ] = None,
    seed: SeedOption = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run that was broken off in this folder."),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Give up the run that was broken off in this folder."),
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints of both halves; 0 for none.")
    ] = CHECKPOINT_EVERY,
    when_unsaved: Annotated[
        WhenUnsaved,
        typer.Option(help="What to do where a checkpoint cannot be written."),
    ] = WhenUnsaved.STOP,
    give_up_after: GiveUpAfterOption = None,
    threads: ThreadsOption = None,
    trusted: TrustedOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    merged: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--merged",
            metavar="FILE",
            help="With --local: the trained model to write.",
            show_default=False,
        ),
    ] = None,
    force: ForceOption = False,
    loss: LossOption = None,
    output: OutputOption = None,
    optimizer: OptimizerOption = None,
    momentum: MomentumOption = None,
    weight_decay: WeightDecayOption = None,
    clip_norm: ClipNormOption = None,
    batchnorm: BatchNormOption = None,
    dropout: DropoutOption = None,
    train: TrainOption = None,
    freeze: FreezeOption = None,
    client_target: ClientTargetOption = None,
    token_file: security.ClientTokenOption = None,
    ca: security.AuthorityOption = None,
    cert: security.CertificateOption = None,
    key: security.KeyOption = None,
    max_message_bytes: security.ReplyBytesOption = None,
) -> None:
    """Train a bundle against its server and save both halves, or with --local a whole model.

    The options under "What is trained, and how" go with --local; a bundle has its own from cut.
    """
    refuse_both("--json", "--quiet", as_json, quiet)
    refuse_both("--resume", "--restart", resume, restart)
    if not local:
        _refuse_recipe(
            {
                "-o": merged,
                "--force": force,
                "--loss": loss,
                "--output": output,
                "--optimizer": optimizer,
                "--momentum": momentum,
                "--weight-decay": weight_decay,
                "--clip-norm": clip_norm,
                "--batchnorm": batchnorm,
                "--dropout": dropout,
                "--train": train or None,
                "--freeze": freeze or None,
                "--client-target": client_target,
            }
        )
        if server is None:
            raise UsageError("name the server with --server, or train a whole model with --local")
        bundle = None
    else:
        refuse_both("--local", "--server", local, server)
        refuse_both("--local", "--resume", local, resume)
        refuse_both("--local", "--restart", local, restart)
        refuse_both("--local", "--trusted", local, trusted)
        if force and merged is None:
            raise UsageError("--force needs an output to overwrite; name it with -o")
        if merged is not None:
            refuse_existing(merged, force=force)
        bundle = splitonnx.cut(
            source,
            at=None,
            loss=loss or "cross-entropy",
            output=output,
            optimizer=make_optimizer(
                optimizer, lr=lr, momentum=momentum, weight_decay=weight_decay, clip_norm=clip_norm
            ),
            batchnorm=None if batchnorm is None else batchnorm.value,
            dropout=None if dropout is None else dropout.value,
            train=train or (),
            freeze=freeze or (),
            client_target=(client_target or Target.TRAINING).value,
        )
    from splitonnx.runtime.client.datasets import open_dataset
    from splitonnx.runtime.workers.heaps import exempt_loaded

    credentials = security.make_access(
        server,
        token_file=token_file,
        ca=ca,
        cert=cert,
        key=key,
        max_message_bytes=max_message_bytes,
    )
    display = printing.choose_display(as_json=as_json, quiet=quiet, epochs=epochs)
    part = source if bundle is None else bundle.client
    with splitonnx.Client(
        part,
        server,
        credentials=credentials,
        threads=threads,
        seed=seed,
        resume=resume,
        give_up_after=give_up_after,
        trusted=trusted,
    ) as client:
        dataset = open_dataset(data)
        has_checkpoints = not local and checkpoint_every > 0
        steps = None if dataset.size is None else epochs * math.ceil(dataset.size / batch_size)
        exempt_loaded()
        with display.showing(steps), _telling_how_to_resume(client, has_checkpoints):
            history = client.fit(
                dataset,
                epochs=epochs,
                batch_size=batch_size,
                eval_data=eval_data,
                learning_rate=lr,
                checkpoint_every=checkpoint_every if has_checkpoints else None,
                when_unsaved="stop" if when_unsaved is WhenUnsaved.STOP else "continue",
                restart=restart,
                save=bundle is None,
                on_step=display.show_step,
                on_epoch=display.show_evaluation,
            )
        if bundle is not None and merged is not None:
            _write_merged(bundle, client, merged, force=force)
    display.summarize(history, _describe_saved(source, local, merged))


@contextmanager
def _telling_how_to_resume(client: splitonnx.Client, has_checkpoints: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if has_checkpoints:
            kept = "the newest checkpoint" if client.checkpoints else "the beginning"
            typer.echo(f"broken off at step {client.steps}; --resume goes on from {kept}", err=True)
        raise


def _refuse_recipe(options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value not in (None, False)]
    if given:
        raise UsageError(
            f"{', '.join(given)}: with --local only; a bundle was cut with its own settings"
        )


def _write_merged(bundle: Bundle, client: splitonnx.Client, path: Path, *, force: bool) -> None:
    trained = replace(bundle.client, trained=client.state(), step=client.steps)
    whole = replace(bundle, parties={"client": trained})
    splitonnx.write_merged(whole, path, overwrite=force)


def _describe_saved(source: Path, local: bool, merged: Path | None) -> str:
    if not local:
        return f"both halves saved; this one in {source}"
    return "not saved; -o would" if merged is None else f"saved as {merged}"
