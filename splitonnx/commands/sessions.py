"""The command ``sessions``, which lists the sessions of a running server."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from splitonnx.commands import printing
from splitonnx.commands.groups import spread
from splitonnx.commands.options import JsonOption
from splitonnx.commands.security import ClientSecurity


@spread
def sessions(
    server: Annotated[
        str, typer.Argument(metavar="URL", help="The server, such as ws://127.0.0.1:8765.")
    ],
    as_json: JsonOption = False,
    *,
    security: ClientSecurity,
) -> None:
    """List the sessions in a server's memory: who is there, and how far.

    If the server has tokens, this takes one with the role operate.
    """
    import msgspec

    from splitonnx.runtime.channels.queries.server_queries import fetch_sessions

    credentials = security.make_credentials(server)
    assert credentials is not None  # a server is named
    found = fetch_sessions(server, credentials)
    if as_json:  # in ASCII, since names from a server may change what a terminal shows
        print(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        printing.print_sessions(found)
