"""The commands that write models and parties in other forms: merge and export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import splitonnx
from splitonnx.commands import printing
from splitonnx.commands.files import refuse_existing
from splitonnx.commands.groups import spread
from splitonnx.commands.options import (
    BundleArgument,
    ForceOption,
    JsonOption,
    QuietOption,
    RawStatesOption,
    refuse_both,
)
from splitonnx.commands.security import ClientSecurity
from splitonnx.errors import UsageError

if TYPE_CHECKING:
    from splitonnx.bundles import Bundle


class Purpose(StrEnum):
    """The values that ``export --for`` accepts."""

    MOBILE = "mobile"


@spread
def merge(
    bundle: BundleArgument,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The file to write.", show_default=False
        ),
    ],
    fold: Annotated[
        bool,
        typer.Option("--fold", help="Add the model's adapters to its weights and remove them."),
    ] = False,
    adapters: Annotated[
        bool,
        typer.Option("--adapters", help="Write the adapters alone, as a safetensors file."),
    ] = False,
    raw_states: RawStatesOption = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="URL",
            help="Fetch the server's part from this running server, such as ws://127.0.0.1:8765; "
            "this takes a token with the role fetch.",
        ),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option(
            metavar="SESSION",
            help="With --from: the session to merge, or the beginning of its name, if the client's "
            "folder has the outcomes of several; by default the last one.",
            show_default=False,
        ),
    ] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
    *,
    security: ClientSecurity,
) -> None:
    """Merge a bundle's parts into one plain ONNX model for inference, with the trained weights.

    If the weights are too large for one ONNX file (2 GiB), they are written to FILE.data. With
    --fold or --adapters, the bundle may also be an ONNX model with adapters.
    """
    refuse_both("--fold", "--adapters", fold, adapters)
    refuse_both("--raw-states", "--adapters", raw_states, adapters)
    if server is None and session is not None:
        raise UsageError("--session: for a server, and none is named; name it with --from")
    credentials = security.make_credentials(server)
    refuse_existing(output, force=force)
    source: Path | Bundle = bundle
    if server is not None:
        near = next(parent for parent in output.absolute().parents if parent.is_dir())
        source = splitonnx.collect(
            bundle, server, credentials=credentials, session=session or "", folder=near
        )
    if adapters:
        size = splitonnx.write_adapters(source, output, overwrite=force)
    else:
        size = splitonnx.write_merged(
            source, output, fold=fold, raw_states=raw_states, overwrite=force
        )
    if not quiet:
        printing.print_written(output, size)


def export(
    source: Annotated[Path, typer.Argument(help="The party's folder.")],
    purpose: Annotated[
        Purpose, typer.Option("--for", help="What it is for: mobile apps.", show_default=False)
    ],
    folder: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FOLDER",
            help="The folder to write; by default the party's with -mobile behind its name.",
            show_default=False,
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Export a party's folder for mobile apps, with graphs in ORT format.

    The exported party can train with the same server.  A party whose graphs need training operators
    cannot be exported.
    """
    refuse_both("--json", "--quiet", as_json, quiet)
    assert purpose is Purpose.MOBILE
    from splitonnx.runtime.engine.exports import choose_place

    place = choose_place(source) if folder is None else folder
    refuse_existing(place, force=force, is_folder=True)
    written = splitonnx.export(source, place, overwrite=force)
    if as_json:
        printing.print_json(printing.summarize_export(written))
    elif not quiet:
        printing.print_export(written)
