"""Options for authentication and TLS, and the command that creates tokens.

Secrets are read from files or the environment, never from the command line, because other users of
the machine can see command lines.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitonnx.commands.groups import list_given
from splitonnx.errors import UsageError

if TYPE_CHECKING:
    import ssl

    from splitonnx.runtime.channels.credentials import Credentials
    from splitonnx.runtime.edge.tokens import Tokens

_SECURITY = "Server access control"
_ACCESS = "Access to the server"


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


@dataclass(frozen=True, kw_only=True)
class ServerSecurity:
    """Options for a server's access control and its TLS certificate."""

    token_file: ServerTokensOption = None
    tls_cert: ServerCertificateOption = None
    tls_key: ServerKeyOption = None
    client_ca: ClientAuthorityOption = None
    origin: OriginOption = None
    insecure: InsecureOption = False
    isolate: IsolateOption = None

    def make_tls(self) -> ssl.SSLContext | None:
        """Build the TLS context from the certificate and key; return ``None`` if neither was given.

        Raises:
            UsageError: an option was given without another one that it requires.
            UnusableFile: a file cannot be read or is not valid.
        """
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError(
                "a certificate and its key go together; give both --tls-cert and --tls-key"
            )
        if self.tls_cert is None or self.tls_key is None:
            if self.client_ca is not None:
                raise UsageError("--client-ca needs TLS; give --tls-cert and --tls-key, too")
            return None
        from splitonnx.runtime.wire.tls import make_server_tls

        return make_server_tls(self.tls_cert, self.tls_key, client_authority=self.client_ca)

    def read_tokens(self) -> Tokens | None:
        """Read the server's token file; return ``None`` if it was not given.

        Raises:
            UnusableFile: the file is missing or is not a valid token file.
        """
        if self.token_file is None:
            return None
        from splitonnx.runtime.edge.tokens import Tokens

        return Tokens.read(self.token_file)


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


@dataclass(frozen=True, kw_only=True)
class ClientSecurity:
    """Options for a client's identity, and for the servers that it trusts."""

    token_file: ClientTokenOption = None
    ca: AuthorityOption = None
    cert: CertificateOption = None
    key: KeyOption = None
    max_message_bytes: ReplyBytesOption = None

    def make_credentials(self, server: str | None) -> Credentials | None:
        """Read the client's token and certificates; return ``None`` if ``server`` is ``None``.

        Raises:
            UsageError: an option was given without a server, or without another option that it
                requires.
            UnusableFile: a file cannot be read or is not valid.
        """
        if server is None:
            if names := list_given(self):
                raise UsageError(f"{', '.join(names)}: for a server, and none is named")
            return None
        from splitonnx.runtime.channels.credentials import MESSAGE_BYTES, Credentials
        from splitonnx.runtime.edge.tokens import read_token
        from splitonnx.runtime.wire.tls import make_client_tls

        tls = None
        if self.ca is not None or self.cert is not None or self.key is not None:
            tls = make_client_tls(authority=self.ca, certificate=self.cert, key=self.key)
        size = MESSAGE_BYTES if self.max_message_bytes is None else self.max_message_bytes
        return Credentials(token=read_token(self.token_file), tls=tls, message_bytes=size)


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
            "metrics, list sessions), fetch (read the server's trained part); repeatable. "
            "Everything but fetch by default.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Create a token, print it once, and add its hash to the server's token file.

    An owner may have several tokens.  To revoke a token, delete its line and restart the server.
    """
    from splitonnx.runtime.edge.tokens import Role, add_token

    try:
        roles = [Role(text) for text in role or ()]
    except ValueError as error:
        raise UsageError(f"a token's roles are {', '.join(Role)}") from error
    print(add_token(token_file, name, roles))
    print(f"{token_file}: added {name}; the token is shown this once", file=sys.stderr)
