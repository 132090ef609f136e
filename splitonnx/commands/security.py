"""Options that lock a server or open one to a client, and the command that makes tokens.

Secrets come from files or the environment, never from the command line, which other users of a
machine can read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitonnx.errors import UsageError

if TYPE_CHECKING:
    import ssl

    from splitonnx.runtime.channels.credentials import Credentials
    from splitonnx.runtime.edge.tokens import Tokens

_SECURITY = "Who may come in"
_LIMITS = "Limits"
_ACCESS = "How the server lets us in"


def _limit(
    field: str, text: str, *, show_default: bool = True, before: str | None = None
) -> object:
    """Make the option of a limit; ``before`` is a name that it had in 0.1.0."""
    names = (field,) if before is None else (field, before)
    return typer.Option(
        *(f"--max-{name.replace('_', '-')}" for name in names),
        help=text,
        rich_help_panel=_LIMITS,
        show_default=show_default,
    )


# --- serve ----------------------------------------------------------------------------------

ServerTokensOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="The tokens that let clients in, as `splitonnx token` writes them.",
        rich_help_panel=_SECURITY,
    ),
]
ServerCertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        metavar="FILE.pem",
        help="The server's certificate; with it the server speaks TLS.",
        rich_help_panel=_SECURITY,
    ),
]
ServerKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-key", metavar="FILE.pem", help="Its private key.", rich_help_panel=_SECURITY
    ),
]
ClientAuthorityOption = Annotated[
    Path | None,
    typer.Option(
        "--client-ca",
        metavar="FILE.pem",
        help="Clients must show a certificate of this authority (mutual TLS).",
        rich_help_panel=_SECURITY,
    ),
]
OriginOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ORIGIN",
        help="Web pages of this origin, such as https://lab.example, may connect; repeatable. "
        "Programs name no origin and are not asked for one.",
        rich_help_panel=_SECURITY,
    ),
]
InsecureOption = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Listen beyond this machine without tokens or certificates.",
        rich_help_panel=_SECURITY,
    ),
]
IsolateOption = Annotated[
    bool | None,
    typer.Option(
        "--isolate/--no-isolate",
        help="Run each owner's sessions in a process of their own; the default where clients show "
        "tokens or certificates, or may come from beyond this machine.",
        show_default=False,
        rich_help_panel=_SECURITY,
    ),
]
MaxClientsOption = Annotated[int, _limit("clients", "Connections at once.")]
MaxUnauthenticatedOption = Annotated[
    int,
    _limit(
        "unauthenticated",
        "Connections at once that have shown no token yet.",
        before="strangers",
    ),
]
MaxSessionsOption = Annotated[int, _limit("sessions", "Sessions at once in memory.")]
MaxSessionsPerTokenOption = Annotated[
    int, _limit("sessions_per_token", "Sessions at once in memory of one owner of tokens.")
]
MaxMemoryBytesOption = Annotated[
    int | None,
    _limit(
        "memory_bytes",
        "Bytes of all sessions' states; half of the machine's memory by default.",
        show_default=False,
    ),
]
MaxMessageBytesOption = Annotated[int, _limit("message_bytes", "Bytes of one message.")]
MaxUnauthBytesOption = Annotated[
    int,
    _limit(
        "unauthenticated_bytes",
        "Bytes of all messages before a token was shown.",
        before="stranger_bytes",
    ),
]
MaxMessagesPerSecondOption = Annotated[
    int,
    _limit("messages_per_second", "Frames a second of one connection, beyond which it is slowed."),
]
MaxIdleSecondsOption = Annotated[
    float, _limit("idle_seconds", "Seconds that a connection may be silent.")
]
MaxMessageSecondsOption = Annotated[
    float, _limit("message_seconds", "Seconds from a message's first byte to its last.")
]
MaxHandshakeSecondsOption = Annotated[
    float, _limit("handshake_seconds", "Seconds for the handshake of TLS, and again of HTTP.")
]
MaxLoginSecondsOption = Annotated[
    float, _limit("login_seconds", "Seconds for the token where it comes as a message.")
]
MaxUnattendedSecondsOption = Annotated[
    float, _limit("unattended_seconds", "Seconds that a session without a connection stays.")
]
MaxClientsPerTokenOption = Annotated[
    int, _limit("clients_per_token", "Connections at once of one owner of tokens.")
]
MaxBatchOption = Annotated[int, _limit("batch", "Rows of one message's tensors.")]
MaxTaskBytesOption = Annotated[
    int | None,
    _limit(
        "task_bytes",
        "Bytes that tasks which run at a time need; a quarter of the machine's memory by default.",
        show_default=False,
    ),
]
MaxStageSecondsOption = Annotated[float, _limit("stage_seconds", "Seconds that one stage may run.")]
MaxWorkersOption = Annotated[
    int, _limit("workers", "Processes that run the stages of isolated sessions.")
]
MaxDiskPerOwnerOption = Annotated[
    int | None,
    _limit("disk_per_owner", "Bytes on disk of one owner's sessions; no limit by default."),
]
MaxNormOption = Annotated[
    float | None, _limit("norm", "Largest L2 norm of a gradient that arrives; none by default.")
]


def make_tls(
    certificate: Path | None, key: Path | None, *, client_authority: Path | None
) -> ssl.SSLContext | None:
    """Read a server's certificates, if any are named.

    Raises:
        UsageError: one is named without another that it needs.
        UnusableFile: a file is not what it should be.
    """
    if (certificate is None) != (key is None):
        raise UsageError(
            "a certificate and its key go together; give both --tls-cert and --tls-key"
        )
    if certificate is None or key is None:
        if client_authority is not None:
            raise UsageError("--client-ca needs TLS; give --tls-cert and --tls-key, too")
        return None
    from splitonnx.runtime.wire.tls import make_server_tls

    return make_server_tls(certificate, key, client_authority=client_authority)


def read_tokens(path: Path | None) -> Tokens | None:
    """Read a server's tokens, if a file is named.

    Raises:
        UnusableFile: it is no file of tokens.
    """
    if path is None:
        return None
    from splitonnx.runtime.edge.tokens import Tokens

    return Tokens.read(path)


# --- train and predict ----------------------------------------------------------------------

ClientTokenOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="Holds the token for the server, and nothing else; or set SPLITONNX_TOKEN.",
        rich_help_panel=_ACCESS,
    ),
]
AuthorityOption = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        metavar="FILE.pem",
        help="The authority that signed the server's certificate, in place of the system's.",
        rich_help_panel=_ACCESS,
    ),
]
CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--cert",
        metavar="FILE.pem",
        help="The client's own certificate, for a server with --client-ca.",
        rich_help_panel=_ACCESS,
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE.pem", help="Its private key.", rich_help_panel=_ACCESS),
]
ReplyBytesOption = Annotated[
    int | None,
    typer.Option(
        "--max-message-bytes",
        metavar="BYTES",
        help="Bytes of one message from the server; 256 MiB by default.",
        rich_help_panel=_ACCESS,
        show_default=False,
    ),
]


def make_access(
    server: str | None,
    *,
    token_file: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    max_message_bytes: int | None,
) -> Credentials | None:
    """Read a client's token and certificates; ``None`` where there is no server.

    Raises:
        UsageError: options are missing, or there is no server, or none with TLS, to use them on.
        UnusableFile: a file is not what it should be.
    """
    given = {
        "--token-file": token_file,
        "--ca": ca,
        "--cert": cert,
        "--key": key,
        "--max-message-bytes": max_message_bytes,
    }
    if server is None:
        names = [name for name, value in given.items() if value is not None]
        if names:
            raise UsageError(f"{', '.join(names)}: for a server, and none is named")
        return None
    from splitonnx.runtime.channels.credentials import MESSAGE_BYTES, Credentials
    from splitonnx.runtime.edge.tokens import read_token
    from splitonnx.runtime.wire.tls import make_client_tls

    tls = None
    if ca is not None or cert is not None or key is not None:
        tls = make_client_tls(authority=ca, certificate=cert, key=key)
    size = MESSAGE_BYTES if max_message_bytes is None else max_message_bytes
    return Credentials(token=read_token(token_file), tls=tls, message_bytes=size)


# --- token ----------------------------------------------------------------------------------


def token(
    name: Annotated[str, typer.Argument(help="Whose it is: sessions belong to this name.")],
    token_file: Annotated[
        Path,
        typer.Option(
            "--token-file", metavar="FILE", help="The server's file, to which it is added."
        ),
    ],
    role: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE",
            help="What it may do: train (and predict), publish the newest state, operate (read "
            "metrics); repeatable. Everything by default.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a token, print it once, and add its hash to the server's file.

    An owner may have several; to take one back, delete its line and start the server again.
    """
    from splitonnx.runtime.edge.tokens import Role, add_token

    try:
        roles = [Role(text) for text in role or ()]
    except ValueError as error:
        raise UsageError(f"a token's roles are {', '.join(Role)}") from error
    print(add_token(token_file, name, roles))
    print(f"{token_file}: added {name}; the token is shown this once", file=sys.stderr)
