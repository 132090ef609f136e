"""The commands that run a bundle's parts as they are: serve, predict."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

import splitonnx
from splitonnx.commands import displays
from splitonnx.commands.files import open_whole, refuse_existing
from splitonnx.commands.options import (
    BatchSizeOption,
    DataOption,
    ForceOption,
    QuietOption,
    ServerOption,
    ThreadsOption,
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
) -> None:
    """Serve a bundle's server part until Ctrl-C or SIGTERM; each client trains its own copy.

    It ends in good order: running steps are finished, sessions written to disk, clients told to
    come again.
    """
    server = splitonnx.Server(bundle, host=host, port=port, threads=threads, resume=resume)
    _log_to_stderr(logging.ERROR if quiet else logging.INFO)
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


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("splitonnx")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False  # other packages hang handlers of their own on the root
    # A caller that speaks no websocket is no reason for a traceback.
    logging.getLogger("websockets").addHandler(logging.NullHandler())
