"""The commands that check, cut and compare models: check, inspect, cut and verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import splitonnx
from splitonnx.commands import disclosures, printing
from splitonnx.commands.files import refuse_existing
from splitonnx.commands.groups import spread
from splitonnx.commands.logs import escape
from splitonnx.commands.loss_options import LossOptions
from splitonnx.commands.model_options import (
    BindOption,
    DequantizeOption,
    DimOption,
    MeasuredCut,
    ModelOptions,
    StateOption,
    read_bindings,
    read_dims,
    read_states,
)
from splitonnx.commands.options import (
    BatchSizeOption,
    BundleArgument,
    CheckOption,
    ClientTargetOption,
    ClipNormOption,
    DataOption,
    DropoutOption,
    ForceOption,
    FreezeOption,
    JsonOption,
    LearningRateOption,
    ModelArgument,
    MomentumOption,
    OptimizerOption,
    OutputOption,
    ParamGroupOption,
    QuietOption,
    RecomputeOption,
    SeedOption,
    ServerTargetOption,
    Target,
    TrainOption,
    WeightDecayOption,
    WireOption,
    choose_batch_size,
    make_optimizer,
    read_groups,
    refuse_both,
)
from splitonnx.commands.pairs import print_pairs
from splitonnx.commands.rows import describe_no_cuts
from splitonnx.errors import UsageError


def _begin() -> None:
    """Prepare this process, which exits after it has processed a model, for that work."""
    from splitonnx.partitioner.graphs.pauses import pause_to_the_end
    from splitonnx.partitioner.native.workers import start

    start()  # it imports what it needs while this process does
    pause_to_the_end()


@spread
def check(
    model: ModelArgument,
    *,
    losses: LossOptions,
    output: OutputOption = None,
    dim: DimOption = None,
    bind: BindOption = None,
    state: StateOption = None,
    dequantize: DequantizeOption = False,
    dropout: DropoutOption = None,
    train: TrainOption = None,
    freeze: FreezeOption = None,
    param_group: ParamGroupOption = None,
    measured: MeasuredCut,
    as_json: JsonOption = False,
) -> None:
    """Check whether a model can be trained; list the rewritten operators and any obstacles.

    Without --loss, each loss is tried, and the first that fits is trained with.
    With --at, the memory that each party of that cut needs is estimated, by AdamW.
    The exit code is 1 if the model cannot be trained.
    """
    measured.check()
    groups = read_groups(param_group)
    _begin()
    found = splitonnx.check(
        model,
        loss=losses.read_chosen(),
        output=output,
        dims=read_dims(dim),
        bind=read_bindings(bind),
        states=read_states(state),
        dequantize=dequantize,
        dropout=None if dropout is None else dropout.value,
        train=train or (),
        freeze=freeze or (),
        groups=groups,
        at=measured.at or (),
        tail_at=measured.tail_at or (),
        batch=measured.batch or 1,
    )
    if as_json:
        printing.print_json(found)
    else:
        printing.print_check(found, model)
    if not found.trainable:
        raise typer.Exit(1)


@spread
def inspect(
    model: ModelArgument,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size, to know bytes where it is dynamic.")
    ] = None,
    sent: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="NAME",
            help="An input, such as an attention mask, that may cross beside the tensor.",
        ),
    ] = None,
    u_shape: Annotated[
        bool,
        typer.Option(
            "--u-shape", help="List pairs for a U-shaped cut: the ones worth considering."
        ),
    ] = False,
    at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="List every pair whose first end is this, as for cut; repeatable.",
        ),
    ] = None,
    tail_at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="List every pair whose second end is this, as for cut; repeatable.",
        ),
    ] = None,
    *,
    losses: LossOptions,
    dim: DimOption = None,
    bind: BindOption = None,
    state: StateOption = None,
    dequantize: DequantizeOption = False,
    output: OutputOption = None,
    dropout: DropoutOption = None,
    train: TrainOption = None,
    freeze: FreezeOption = None,
    wire: WireOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the tensors at which a model can be cut, and how much data each cut sends per step.

    With --u-shape, --at or --tail-at, list pairs of tensors for a U-shaped cut instead, with the
    bytes that each sends per sample.  Say --loss as for cut where it matters: a model predicts
    without a loss that is its own.
    """
    loss = losses.read_chosen()
    is_end_named = bool(at or tail_at)
    if u_shape or is_end_named:
        if batch is not None:
            raise UsageError("pairs are listed with their bytes per sample; leave out --batch")
        if wire is not None:
            raise UsageError("pairs are listed without codecs; leave out --wire")
        _begin()
        pairs = splitonnx.inspect_pairs(
            model,
            at=at or (),
            tail_at=tail_at or (),
            sent=sent or (),
            dims=read_dims(dim),
            bind=read_bindings(bind),
            states=read_states(state),
            dequantize=dequantize,
            output=output,
            loss=loss,
            dropout=None if dropout is None else dropout.value,
            train=train or (),
            freeze=freeze or (),
        )
        if as_json:
            printing.print_json(pairs)
        else:
            print_pairs(pairs, is_end_named=is_end_named)
        return
    _begin()
    cuts = splitonnx.inspect(
        model,
        batch=batch,
        sent=sent or (),
        dims=read_dims(dim),
        bind=read_bindings(bind),
        states=read_states(state),
        dequantize=dequantize,
        output=output,
        loss=loss,
        dropout=None if dropout is None else dropout.value,
        train=train or (),
        freeze=freeze or (),
        wire=wire,
    )
    if as_json:
        printing.print_json(cuts)
        return
    if cuts:
        printing.print_cuts(cuts)
        return
    from splitonnx.partitioner.reports.inspections import advise_sent

    advised: list[tuple[str, ...]] = []
    if not sent:
        advised = advise_sent(
            model,
            dims=read_dims(dim),
            bind=read_bindings(bind),
            states=read_states(state),
            dequantize=dequantize,
            output=output,
            loss=loss,
            train=train or (),
            freeze=freeze or (),
        )
    print(escape(describe_no_cuts(advised)))


@spread
def cut(
    model: ModelArgument,
    at: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="Tensor, node or glob pattern that goes from client to server; repeatable.",
        ),
    ],
    bundle: Annotated[
        Path,
        typer.Option(
            "-o", "--bundle", metavar="BUNDLE", help="The folder to write.", show_default=False
        ),
    ],
    tail_at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What comes back to the client for a U-shaped cut: the layers behind it, the "
            "loss and the labels stay there; repeatable.",
        ),
    ] = None,
    send_input: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Let this raw input leave the client, named in --at or crossing beside it; "
            "repeatable.",
        ),
    ] = None,
    send_labels: Annotated[
        bool,
        typer.Option(
            "--send-labels",
            help="Let the labels leave the client, as a cut without --tail-at needs, or one "
            "whose tail has no layer of weights.",
        ),
    ] = False,
    *,
    losses: LossOptions,
    output: OutputOption = None,
    optimizer: OptimizerOption = None,
    lr: LearningRateOption = None,
    momentum: MomentumOption = None,
    weight_decay: WeightDecayOption = None,
    clip_norm: ClipNormOption = None,
    param_group: ParamGroupOption = None,
    dropout: DropoutOption = None,
    train: TrainOption = None,
    freeze: FreezeOption = None,
    means: ModelOptions,
    wire: WireOption = None,
    recompute: RecomputeOption = None,
    client_target: ClientTargetOption = None,
    server_target: ServerTargetOption = None,
    check: CheckOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Cut a model into a client part and a server part that can be trained together."""
    refuse_both("--json", "--quiet", as_json, quiet)
    optimizing = make_optimizer(
        optimizer,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        groups=param_group,
    )
    batchnorm, ties = means.read_batchnorm(), means.read_ties()
    dims, bindings = read_dims(means.dim), read_bindings(means.bind)
    refuse_existing(bundle, force=force, is_folder=True)
    _begin()
    made = splitonnx.cut(
        model,
        at=at,
        tail_at=tail_at or (),
        loss=losses.read_losses(),
        output=output,
        optimizer=optimizing,
        batchnorm=batchnorm,
        dropout=None if dropout is None else dropout.value,
        train=train or (),
        freeze=freeze or (),
        dims=dims,
        bind=bindings,
        dequantize=means.dequantize,
        ties=ties,
        stop_gradients=means.stop_gradient or (),
        states=read_states(means.state),
        class_axis=means.class_axis,
        labels=means.labels,
        client_target=(client_target or Target.TRAINING).value,
        server_target=(server_target or Target.TRAINING).value,
        send_inputs=send_input or (),
        send_labels=send_labels,
        check=check,
        wire=wire,
        recompute=False if recompute is None else recompute.value,
    )
    made.save(bundle, overwrite=force)
    if as_json:
        sent = disclosures.summarize_steps(made.client.manifest)
        kept = made.client.manifest.raw_states
        summary = {**printing.summarize_bundle(made), "leaves": sent, "raw_states": kept}
        printing.print_json(summary)
    elif not quiet:
        printing.print_bundle(made, bundle)
        disclosures.print_steps(made.client.manifest)


def verify(
    bundle: BundleArgument,
    data: DataOption,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to compare.")] = 5,
    batch_size: BatchSizeOption = None,
    rtol: Annotated[
        float, typer.Option(min=0.0, help="Largest relative difference that counts as equal.")
    ] = 1e-5,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model both split and unsplit, and compare losses and parameters after each step.

    Nothing is written.  The exit code is 1 if the results differ by more than --rtol.
    """
    refuse_both("--json", "--quiet", as_json, quiet)
    from splitonnx.runtime.client.datasets import open_dataset

    dataset = open_dataset(data)
    verification = splitonnx.verify(
        bundle,
        dataset,
        steps=steps,
        batch_size=choose_batch_size(batch_size, dataset),
        rtol=rtol,
        seed=seed,
    )
    if as_json:
        printing.print_json_lines(printing.summarize_verification(verification))
    elif not quiet:
        printing.print_verification(verification)
    if not verification.ok:
        raise typer.Exit(1)
