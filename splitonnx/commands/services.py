"""The commands that run a bundle's parts as they are: serve, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import splitonnx
from splitonnx.commands import printing, security
from splitonnx.commands.files import open_whole, refuse_existing
from splitonnx.commands.logs import LogFormat, LogLevel, logging_to_stderr
from splitonnx.commands.options import (
    BatchSizeOption,
    DataOption,
    ForceOption,
    GiveUpAfterOption,
    LogFormatOption,
    LogLevelOption,
    QuietOption,
    ServerOption,
    ThreadsOption,
    TrustedOption,
    refuse_both,
)
from splitonnx.runtime.limits import Limits


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
    quiet: QuietOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
    log_level: LogLevelOption = None,
    token_file: security.ServerTokensOption = None,
    tls_cert: security.ServerCertificateOption = None,
    tls_key: security.ServerKeyOption = None,
    client_ca: security.ClientAuthorityOption = None,
    origin: security.OriginOption = None,
    insecure: security.InsecureOption = False,
    isolate: security.IsolateOption = None,
    max_clients: security.MaxClientsOption = Limits.clients,
    max_unauthenticated: security.MaxUnauthenticatedOption = Limits.unauthenticated,
    max_sessions: security.MaxSessionsOption = Limits.sessions,
    max_sessions_per_token: security.MaxSessionsPerTokenOption = Limits.sessions_per_token,
    max_memory_bytes: security.MaxMemoryBytesOption = Limits.memory_bytes,
    max_message_bytes: security.MaxMessageBytesOption = Limits.message_bytes,
    max_unauthenticated_bytes: security.MaxUnauthBytesOption = Limits.unauthenticated_bytes,
    max_messages_per_second: security.MaxMessagesPerSecondOption = Limits.messages_per_second,
    max_idle_seconds: security.MaxIdleSecondsOption = Limits.idle_seconds,
    max_message_seconds: security.MaxMessageSecondsOption = Limits.message_seconds,
    max_handshake_seconds: security.MaxHandshakeSecondsOption = Limits.handshake_seconds,
    max_login_seconds: security.MaxLoginSecondsOption = Limits.login_seconds,
    max_unattended_seconds: security.MaxUnattendedSecondsOption = Limits.unattended_seconds,
    max_clients_per_token: security.MaxClientsPerTokenOption = Limits.clients_per_token,
    max_batch: security.MaxBatchOption = Limits.batch,
    max_task_bytes: security.MaxTaskBytesOption = Limits.task_bytes,
    max_stage_seconds: security.MaxStageSecondsOption = Limits.stage_seconds,
    max_workers: security.MaxWorkersOption = Limits.workers,
    max_disk_per_owner: security.MaxDiskPerOwnerOption = Limits.disk_per_owner,
    max_norm: security.MaxNormOption = Limits.norm,
) -> None:
    """Serve a bundle's server part until Ctrl-C or SIGTERM; each client trains its own copy.

    It ends in good order: running steps are finished, sessions written to disk, clients told to
    come again.
    """
    refuse_both("--quiet", "--log-level", quiet, log_level)
    level = LogLevel.ERROR if quiet else log_level or LogLevel.INFO
    limits = Limits(
        clients=max_clients,
        unauthenticated=max_unauthenticated,
        sessions=max_sessions,
        sessions_per_token=max_sessions_per_token,
        memory_bytes=max_memory_bytes,
        message_bytes=max_message_bytes,
        unauthenticated_bytes=max_unauthenticated_bytes,
        messages_per_second=max_messages_per_second,
        idle_seconds=max_idle_seconds,
        message_seconds=max_message_seconds,
        handshake_seconds=max_handshake_seconds,
        login_seconds=max_login_seconds,
        unattended_seconds=max_unattended_seconds,
        clients_per_token=max_clients_per_token,
        batch=max_batch,
        task_bytes=max_task_bytes,
        stage_seconds=max_stage_seconds,
        workers=max_workers,
        disk_per_owner=max_disk_per_owner,
        norm=max_norm,
    )
    with logging_to_stderr(level, log_format):
        splitonnx.Server(
            bundle,
            host=host,
            port=port,
            threads=threads,
            resume=resume,
            limits=limits,
            tokens=security.read_tokens(token_file),
            tls=security.make_tls(tls_cert, tls_key, client_authority=client_ca),
            origins=origin or (),
            insecure=insecure,
            isolate=isolate,
            web=web,
            client=client,
            keep_sessions=keep_sessions,
        ).serve_forever()


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
    token_file: security.ClientTokenOption = None,
    ca: security.AuthorityOption = None,
    cert: security.CertificateOption = None,
    key: security.KeyOption = None,
    max_message_bytes: security.ReplyBytesOption = None,
) -> None:
    """Run the model split, and write its outputs by name into an .npz file."""
    refuse_existing(output, force=force)
    credentials = security.make_access(
        server,
        token_file=token_file,
        ca=ca,
        cert=cert,
        key=key,
        max_message_bytes=max_message_bytes,
    )
    with splitonnx.Client(
        bundle,
        server,
        threads=threads,
        credentials=credentials,
        give_up_after=give_up_after,
        trusted=trusted,
    ) as client:
        outputs: dict[str, Any] = {**client.predict(data, batch_size=batch_size)}
    import numpy as np

    with open_whole(output) as file:
        np.savez(file, **outputs)
    if not quiet:
        printing.print_outputs(output, outputs)
