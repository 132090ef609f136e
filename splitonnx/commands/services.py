"""The commands ``serve`` and ``predict``, which run the parts of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import splitonnx
from splitonnx.commands import printing
from splitonnx.commands.files import open_whole, refuse_existing
from splitonnx.commands.groups import spread
from splitonnx.commands.limits import LIMITS
from splitonnx.commands.logs import logging_to_stderr
from splitonnx.commands.options import (
    BatchSizeOption,
    DataOption,
    ForceOption,
    GiveUpAfterOption,
    LogOptions,
    QuietOption,
    ServerOption,
    ThreadsOption,
    TrustedOption,
)
from splitonnx.commands.security import ClientSecurity, ServerSecurity
from splitonnx.runtime.limits import Limits


@spread
def serve(
    bundle: Annotated[Path, typer.Argument(help="The server's folder.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port; 0 takes any free one.")
    ] = 8765,
    threads: ThreadsOption = None,
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
    security: ServerSecurity,
    limits: Annotated[Limits, LIMITS],
) -> None:
    """Serve a bundle's server part until Ctrl-C or SIGTERM; each client trains its own copy.

    The server shuts down gracefully: it completes the steps in progress, saves sessions to disk,
    and asks clients to reconnect later.
    """
    with logging_to_stderr(logs.choose_level(), logs.log_format):
        splitonnx.Server(
            bundle,
            host=host,
            port=port,
            threads=threads,
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
        ).serve_forever()


@spread
def predict(
    bundle: Annotated[Path, typer.Argument(help="The client's folder.")],
    data: DataOption,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE.npz", help="The file to write.", show_default=False
        ),
    ],
    server: ServerOption = None,
    give_up_after: GiveUpAfterOption = None,
    batch_size: BatchSizeOption = 32,
    threads: ThreadsOption = None,
    trusted: TrustedOption = False,
    force: ForceOption = False,
    quiet: QuietOption = False,
    *,
    security: ClientSecurity,
) -> None:
    """Run the split model on data, and write its outputs to an .npz file."""
    refuse_existing(output, force=force)
    with splitonnx.Client(
        bundle,
        server,
        threads=threads,
        credentials=security.make_credentials(server),
        give_up_after=give_up_after,
        trusted=trusted,
    ) as client:
        outputs: dict[str, Any] = {**client.predict(data, batch_size=batch_size)}
    import numpy as np

    with open_whole(output) as file:
        np.savez(file, **outputs)
    if not quiet:
        printing.print_outputs(output, outputs)
