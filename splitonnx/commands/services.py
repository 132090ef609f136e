"""The commands that run a bundle's parts as they are: serve, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import splitonnx
from splitonnx.commands import displays
from splitonnx.commands.files import open_whole, refuse_existing
from splitonnx.commands.logs import LogFormat, LogLevel, logging_to_stderr
from splitonnx.commands.options import (
    BatchSizeOption,
    DataOption,
    ForceOption,
    LogFormatOption,
    LogLevelOption,
    QuietOption,
    ServerOption,
    ThreadsOption,
    refuse_both,
)


def serve(
    bundle: Annotated[Path, typer.Argument(help="The server's folder.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port; 0 takes any free one.")
    ] = 8765,
    threads: ThreadsOption = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with sessions that an earlier server left here."),
    ] = False,
    quiet: QuietOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
    log_level: LogLevelOption = None,
) -> None:
    """Serve a bundle's server part until Ctrl-C or SIGTERM; each client trains its own copy.

    It ends in good order: running steps are finished, sessions written to disk, clients told to
    come again.
    """
    refuse_both("--quiet", "--log-level", quiet, log_level)
    level = LogLevel.ERROR if quiet else log_level or LogLevel.INFO
    with logging_to_stderr(level, log_format):
        server = splitonnx.Server(bundle, host=host, port=port, threads=threads, resume=resume)
        server.serve_forever()


def predict(
    bundle: Annotated[Path, typer.Argument(help="The client's folder.")],
    data: DataOption,
    output: Annotated[
        Path,
        typer.Option("-o", metavar="FILE.npz", help="The file to write.", show_default=False),
    ],
    server: ServerOption = None,
    batch_size: BatchSizeOption = 32,
    threads: ThreadsOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the model split, and write its outputs by name into an .npz file."""
    refuse_existing(output, force=force)
    with splitonnx.Client(bundle, server, threads=threads) as client:
        outputs: dict[str, Any] = {**client.predict(data, batch_size=batch_size)}
    import numpy as np

    with open_whole(output) as file:
        np.savez(file, **outputs)
    if not quiet:
        displays.print_outputs(output, outputs)
