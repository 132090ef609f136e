"""The commands ``serve`` and ``predict``, which run the parts of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import splitonnx
from splitonnx.commands import printing
from splitonnx.commands.files import open_whole, refuse_existing, write_whole_folder
from splitonnx.commands.groups import spread
from splitonnx.commands.limits import LIMITS
from splitonnx.commands.logs import logging_to_stderr
from splitonnx.commands.options import (
    BatchSizeOption,
    DataOption,
    ForceOption,
    GiveUpAfterOption,
    LogOptions,
    ProviderOption,
    QuietOption,
    ServerOption,
    ThreadsOption,
    TrustedOption,
    choose_batch_size,
    refuse_both,
)
from splitonnx.commands.policies import JoiningOptions
from splitonnx.commands.security import ClientSecurity, ServerSecurity
from splitonnx.errors import UnwritableFile
from splitonnx.interrupts import check_interrupt
from splitonnx.runtime.limits import Limits

if TYPE_CHECKING:
    from splitonnx.runtime.client.datasets import Dataset, FileDataset


@spread
def serve(
    bundle: Annotated[Path, typer.Argument(help="The server's folder.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port; 0 takes any free one.")
    ] = 8765,
    threads: ThreadsOption = None,
    provider: ProviderOption = "cpu",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume sessions that an earlier server left here."),
    ] = False,
    keep_sessions: Annotated[
        float | None,
        typer.Option(
            metavar="DAYS",
            help="Days after which saved sessions are deleted that nobody came back to.",
            show_default=False,
        ),
    ] = None,
    client: Annotated[
        Path | None,
        typer.Option(help="The client's folder, to give to browsers at /client/."),
    ] = None,
    web: Annotated[
        Path | None,
        typer.Option(help="A folder of web pages to give out on the same port; they may connect."),
    ] = None,
    *,
    logs: LogOptions,
    joins: JoiningOptions,
    security: ServerSecurity,
    limits: Annotated[Limits, LIMITS],
) -> None:
    """Serve a bundle's server part until Ctrl-C or SIGTERM, to any number of clients.

    Each client trains its own copy, and a --policy may join what they learn.

    The server shuts down gracefully: it completes the steps in progress, saves sessions to disk,
    and asks clients to reconnect later.
    """
    if security.isolate is False and limits.workers != Limits().workers:
        refuse_both("--no-isolate", "--max-workers", True, True)
    policy = joins.read()
    with logging_to_stderr(logs.choose_level(), logs.log_format):
        server = splitonnx.Server(
            bundle,
            host=host,
            port=port,
            threads=threads,
            provider=provider,
            resume=resume,
            limits=limits,
            tokens=security.read_tokens(),
            tls=security.make_tls(),
            origins=security.origin or (),
            insecure=security.insecure,
            isolate=security.isolate,
            web=web,
            client=client,
            keep_sessions=keep_sessions,
            policy=policy,
        )
        check_interrupt()  # discarded while modules were imported: then do not serve
        server.serve_forever()


@spread
def predict(
    bundle: Annotated[Path, typer.Argument(help="The client's folder.")],
    data: DataOption,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE.npz",
            help="The file to write; the folder, if the data are a folder of .npz files.",
            show_default=False,
        ),
    ],
    server: ServerOption = None,
    give_up_after: GiveUpAfterOption = None,
    batch_size: BatchSizeOption = None,
    threads: ThreadsOption = None,
    provider: ProviderOption = "cpu",
    trusted: TrustedOption = False,
    force: ForceOption = False,
    quiet: QuietOption = False,
    *,
    security: ClientSecurity,
) -> None:
    """Run the split model on data, and write its outputs to an .npz file.

    If the data are a folder with one .npz file per batch, write a folder instead, with a file of
    outputs for each batch, under the same name.
    """
    from splitonnx.runtime.client.datasets import FileDataset, open_dataset

    dataset = open_dataset(data)
    samples = choose_batch_size(batch_size, dataset)
    if isinstance(dataset, FileDataset):
        _refuse_other_files(output, dataset, force=force)
    else:
        refuse_existing(output, force=force)
    with splitonnx.Client(
        bundle,
        server,
        threads=threads,
        provider=provider,
        credentials=security.make_credentials(server),
        give_up_after=give_up_after,
        share=True,  # only training shares anything
        trusted=trusted,
    ) as client:
        if isinstance(dataset, FileDataset):
            _predict_files(client, dataset, output)
        else:
            _predict_arrays(client, dataset, samples, output, quiet=quiet)
        if client.placement is not None and not quiet:
            printing.print_remark(client.placement.describe())
    if isinstance(dataset, FileDataset) and not quiet:
        printing.print_output_files(output, dataset.size)


def _predict_arrays(
    client: splitonnx.Client, dataset: Dataset, batch_size: int, output: Path, *, quiet: bool
) -> None:
    outputs: dict[str, Any] = {**client.predict(dataset, batch_size=batch_size)}
    import numpy as np

    with open_whole(output) as file:
        np.savez(file, **outputs)
    if not quiet:
        printing.print_outputs(output, outputs)


def _predict_files(client: splitonnx.Client, dataset: FileDataset, output: Path) -> None:
    """Predict one file after the other, and write each before the next is read."""
    import numpy as np

    batches = client.predict_batches(dataset)

    def write(folder: Path) -> None:
        for file, outputs in zip(dataset.files, batches, strict=True):
            arrays: dict[str, Any] = {**outputs}
            with open_whole(folder / file.name) as stream:
                np.savez(stream, **arrays)

    write_whole_folder(output, write)


def _refuse_other_files(output: Path, dataset: FileDataset, *, force: bool) -> None:
    """Raise if writing the folder would delete anything but earlier predictions."""
    refuse_existing(output, force=force, is_folder=True)
    names = {file.name for file in dataset.files}
    if not output.exists():
        return
    if not output.is_dir() or output.samefile(dataset.files[0].parent):
        raise UnwritableFile(str(output), "it is a file, or the folder of the data; name another")
    others = sorted(entry.name for entry in output.iterdir() if entry.name not in names)
    if others:
        raise UnwritableFile(str(output), f"it holds '{others[0]}', which is not overwritten")
