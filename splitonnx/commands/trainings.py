"""The ``train`` command: train a bundle with a server, or an uncut model as a baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import splitonnx
from splitonnx.commands.disclosures import RunDisclosure
from splitonnx.commands.files import refuse_existing
from splitonnx.commands.groups import list_given, spread
from splitonnx.commands.loss_options import LossOptions
from splitonnx.commands.model_options import ModelOptions, read_bindings, read_dims, read_states
from splitonnx.commands.options import (
    BatchSizeOption,
    CheckOption,
    ClientTargetOption,
    ClipNormOption,
    DataOption,
    DropoutOption,
    ForceOption,
    FreezeOption,
    GiveUpAfterOption,
    JsonOption,
    MetricOption,
    MomentumOption,
    OptimizerOption,
    OutputOption,
    ParamGroupOption,
    ProviderOption,
    QuietOption,
    RawStatesOption,
    SeedOption,
    ServerOption,
    ShareOption,
    Target,
    ThreadsOption,
    TrainOption,
    TrustedOption,
    WeightDecayOption,
    choose_batch_size,
    make_optimizer,
    refuse_both,
)
from splitonnx.commands.schedules import ScheduleOptions
from splitonnx.commands.security import ClientSecurity
from splitonnx.commands.stopping import StoppingOptions
from splitonnx.commands.training_displays import PlacementNote, choose_display
from splitonnx.commands.training_logs import TrainingLogOptions, call_both
from splitonnx.errors import UsageError
from splitonnx.names import CLIENT
from splitonnx.peak_memory import read_peak_memory
from splitonnx.schedules import plan_rates

if TYPE_CHECKING:
    from splitonnx.bundles import Bundle


CHECKPOINT_EVERY = 100
"""The default number of steps between two checkpoints."""


class WhenUnsaved(StrEnum):
    """The values that ``--when-unsaved`` accepts."""

    STOP = "stop"
    CONTINUE = "continue"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options for the length of a training run, for its checkpoints, and for resuming it."""

    epochs: Annotated[int, typer.Option(min=1, help="Times through the data.")] = 1
    batch_size: BatchSizeOption = None
    accumulate: Annotated[
        int,
        typer.Option(
            min=1,
            help="Micro-batches that the batch of each step is divided into, to need less memory; "
            "their gradients are added up.",
        ),
    ] = 1
    micro_batches: Annotated[
        int,
        typer.Option(
            min=1,
            help="The same, with several micro-batches under way at a time, so that client, "
            "network and server work at once.",
        ),
    ] = 1
    in_flight: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most micro-batches under way at a time, with --micro-batches: up to 16; 3 if not "
            "given.",
        ),
    ] = None
    lr: Annotated[
        float | None, typer.Option("--lr", help="Learning rate, in place of the bundle's.")
    ] = None
    seed: SeedOption = 0
    shuffle: Annotated[
        bool,
        typer.Option(
            "--shuffle/--no-shuffle",
            help="Take the data in another random order in each epoch, or always in their own.",
        ),
    ] = True
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume the run that was interrupted in this folder."),
    ] = False
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Give up the run that was interrupted in this folder."),
    ] = False
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints of both halves; 0 for none.")
    ] = CHECKPOINT_EVERY
    when_unsaved: Annotated[
        WhenUnsaved,
        typer.Option(help="What to do where a checkpoint cannot be written."),
    ] = WhenUnsaved.STOP


@dataclass(frozen=True, kw_only=True)
class LocalOptions(ModelOptions, LossOptions):
    """The options for ``--local``: how to train an uncut model, and where to write the result."""

    merged: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--merged",
            metavar="FILE",
            help="With --local: the trained model to write.",
            show_default=False,
        ),
    ] = None
    raw_states: RawStatesOption = False
    force: ForceOption = False
    output: OutputOption = None
    optimizer: OptimizerOption = None
    momentum: MomentumOption = None
    weight_decay: WeightDecayOption = None
    clip_norm: ClipNormOption = None
    param_group: ParamGroupOption = None
    dropout: DropoutOption = None
    train: TrainOption = None
    freeze: FreezeOption = None
    client_target: ClientTargetOption = None
    check: CheckOption = None

    def list_given(self) -> list[str]:
        """List the names of the options that were given."""
        told = {"--merged": "-o", "--check": "--no-check" if self.check is False else "--check"}
        return [told.get(name, name) for name in list_given(self)]

    def prepare(self, model: Path, lr: float | None) -> Bundle:
        """Build a bundle from a model without cutting it.

        ``lr`` is the learning rate, or ``None`` for the optimizer's default.

        Raises:
            UsageError: the options contradict each other, or a value is out of range.
            UnwritableFile: the output file exists already or cannot be written.
            ModelError: the model cannot be trained.
        """
        if self.force and self.merged is None:
            raise UsageError("--force needs an output to overwrite; name it with -o")
        if self.raw_states and self.merged is None:
            raise UsageError("--raw-states needs an output to write; name it with -o")
        optimizer = make_optimizer(
            self.optimizer,
            lr=lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            groups=self.param_group,
        )
        batchnorm, ties = self.read_batchnorm(), self.read_ties()
        losses = self.read_losses()
        dims, bindings = read_dims(self.dim), read_bindings(self.bind)
        if self.merged is not None:
            refuse_existing(self.merged, force=self.force)
        return splitonnx.cut(
            model,
            at=None,
            loss=losses,
            output=self.output,
            optimizer=optimizer,
            batchnorm=batchnorm,
            dropout=None if self.dropout is None else self.dropout.value,
            train=self.train or (),
            freeze=self.freeze or (),
            dims=dims,
            bind=bindings,
            dequantize=self.dequantize,
            ties=ties,
            stop_gradients=self.stop_gradient or (),
            states=read_states(self.state),
            class_axis=self.class_axis,
            labels=self.labels,
            client_target=(self.client_target or Target.TRAINING).value,
            check=self.check,
        )

    def write(self, bundle: Bundle, client: splitonnx.Client) -> None:
        """Write the trained model if an output file was given."""
        if self.merged is None:
            return
        trained = replace(bundle.client, trained=client.state(), step=client.steps)
        whole = replace(bundle, parties={CLIENT: trained})
        splitonnx.write_merged(whole, self.merged, raw_states=self.raw_states, overwrite=self.force)


@spread
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
    metric: MetricOption = None,
    *,
    run: RunOptions,
    rates: ScheduleOptions,
    stops: StoppingOptions,
    logs: TrainingLogOptions,
    give_up_after: GiveUpAfterOption = None,
    threads: ThreadsOption = None,
    provider: ProviderOption = "cpu",
    share: ShareOption = False,
    trusted: TrustedOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    whole: LocalOptions,
    security: ClientSecurity,
) -> None:
    """Train a bundle with its server and save both parts; with --local, train an uncut model.

    The options under "What is trained, and how" require --local; for a bundle, these settings were
    chosen when the model was cut.
    """
    refuse_both("--json", "--quiet", as_json, quiet)
    refuse_both("--resume", "--restart", run.resume, run.restart)
    if run.lr is not None and not 0 <= run.lr < math.inf:
        raise UsageError(f"--lr must be at least 0 and finite, not {run.lr:g}")
    schedule, stopping = rates.read(), stops.read()
    if local:
        _refuse_remote(server, run, trusted, give_up_after, share)
    else:
        _refuse_local(server, whole)
    from splitonnx.pipelines import USUAL_IN_FLIGHT, choose_division
    from splitonnx.runtime.client.datasets import open_dataset
    from splitonnx.runtime.client.options import choose_measures
    from splitonnx.runtime.workers.heaps import exempt_loaded

    if run.in_flight is not None and run.micro_batches == 1:
        raise UsageError(
            "--in-flight bounds the micro-batches under way; give --micro-batches, too"
        )
    in_flight = run.in_flight or USUAL_IN_FLIGHT
    choose_division(run.accumulate, run.micro_batches, in_flight)
    dataset = open_dataset(data)  # before the work of a cut, and before a server makes a session
    held_out = None if eval_data is None else open_dataset(eval_data)
    batch_size = choose_batch_size(
        run.batch_size, dataset, *([] if held_out is None else [held_out])
    )
    batches = dataset.count_batches(batch_size)
    if schedule is not None and batches is not None:
        plan_rates(schedule, epochs=run.epochs, steps_per_epoch=batches)
    bundle = whole.prepare(source, run.lr) if local else None
    display = choose_display(as_json=as_json, quiet=quiet, epochs=run.epochs)
    with splitonnx.Client(
        source if bundle is None else bundle.client,
        server,
        credentials=security.make_credentials(server),
        threads=threads,
        provider=provider,
        seed=run.seed,
        resume=run.resume,
        give_up_after=give_up_after,
        share=share,
        trusted=trusted,
    ) as client:
        has_data, names = eval_data is not None, metric or ()
        choose_measures(client.manifest, names, stopping, has_data=has_data, can_return=True)
        disclosure = RunDisclosure(
            client.manifest,
            dataset,
            held_out,
            terms=client.terms,
            epochs=run.epochs,
            batch_size=batch_size,
        )
        note = PlacementNote(client, display)
        show_step = call_both(display.show_step, note.add_step)
        has_checkpoints = not local and run.checkpoint_every > 0
        exempt_loaded()
        with (
            logs.open(step=client.steps, resumes=run.resume or run.restart) as log,
            display.showing(None if batches is None else run.epochs * batches),
            _telling_how_to_resume(client, has_checkpoints),
        ):
            history = client.fit(
                dataset,
                epochs=run.epochs,
                batch_size=batch_size,
                accumulate=run.accumulate,
                micro_batches=run.micro_batches,
                in_flight=in_flight,
                shuffle=run.shuffle,
                eval_data=held_out,
                metrics=names,
                learning_rate=run.lr,
                schedule=schedule,
                stopping=stopping,
                checkpoint_every=run.checkpoint_every if has_checkpoints else None,
                when_unsaved="stop" if run.when_unsaved is WhenUnsaved.STOP else "continue",
                restart=run.restart,
                save=bundle is None,
                on_start=None if local or quiet else partial(disclosure.show, as_json=as_json),
                on_step=call_both(show_step, log.add_step) if log else show_step,
                on_epoch=call_both(display.show_evaluation, log.add_evaluation)
                if log
                else display.show_evaluation,
            )
        note.finish()
        if bundle is not None:
            whole.write(bundle, client)
    saved = _describe_saved(source, local, whole.merged)
    display.summarize(history, saved, read_peak_memory())


def _refuse_remote(
    server: str | None,
    run: RunOptions,
    trusted: bool,
    give_up_after: float | None,
    share: bool,
) -> None:
    """Raise if ``--local`` was given together with an option that needs a server."""
    refuse_both("--local", "--server", True, server)
    refuse_both("--local", "--resume", True, run.resume)
    refuse_both("--local", "--restart", True, run.restart)
    refuse_both("--local", "--trusted", True, trusted)
    refuse_both("--local", "--share", True, share)
    refuse_both("--local", "--give-up-after", True, give_up_after is not None)
    for option in list_given(run):
        if option in ("--checkpoint-every", "--when-unsaved"):
            refuse_both("--local", option, True, True)


def _refuse_local(server: str | None, whole: LocalOptions) -> None:
    """Raise if options that need ``--local`` were given without it, or if no server was given."""
    if given := whole.list_given():
        raise UsageError(
            f"{', '.join(given)}: with --local only; a bundle was cut with its own settings"
        )
    if server is None:
        raise UsageError("name the server with --server, or train a whole model with --local")


@contextmanager
def _telling_how_to_resume(client: splitonnx.Client, has_checkpoints: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if has_checkpoints:
            kept = "the newest checkpoint" if client.checkpoints else "the beginning"
            typer.echo(
                f"interrupted at step {client.steps}; --resume continues from {kept}", err=True
            )
        raise


def _describe_saved(source: Path, local: bool, merged: Path | None) -> str:
    if not local:
        return f"both halves saved; this one in {source}"
    return "not saved; -o would" if merged is None else f"saved as {merged}"
