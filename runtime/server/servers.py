"""The server, which trains its part of a model in a separate session for each client.

The event loop receives and sends messages and answers pings.  ONNX Runtime works in threads, one
message at a time per session.  While a reply is being sent, the next computation is already
running, and it is completed even if the reply never arrives.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import ssl
import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

from splitonnx.bundles import PartyBundle
from splitonnx.disclosures import describe_step, list_sent
from splitonnx.errors import UsageError
from splitonnx.folder_locks import FolderLock
from splitonnx.names import SERVER, TRAIN
from splitonnx.runtime.edge.client_files import ClientFiles
from splitonnx.runtime.edge.descriptors import Rarely, find_limit, raise_limit
from splitonnx.runtime.edge.http import Refusal
from splitonnx.runtime.edge.pages import read_pages
from splitonnx.runtime.edge.tokens import Tokens
from splitonnx.runtime.edge.websockets import Peer, serve
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.estimates import Estimates
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.engine.providers import CPU
from splitonnx.runtime.limits import GIB, Limits
from splitonnx.runtime.scheduling import event_loops
from splitonnx.runtime.scheduling.budgets import Budget
from splitonnx.runtime.scheduling.turns import Turns
from splitonnx.runtime.server.contexts import ServerContext
from splitonnx.runtime.server.deliveries import keep_ticking
from splitonnx.runtime.server.handlers import ConnectionHandler
from splitonnx.runtime.server.metrics import Metrics
from splitonnx.runtime.server.operations.responders import Responder
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.storage.archives import DAY
from splitonnx.runtime.wire.exposure import check_exposure, is_loopback
from splitonnx.runtime.workers.blocks import SharedTensors
from splitonnx.runtime.workers.heaps import exempt_loaded, keep_buffers
from splitonnx.runtime.workers.pools import WorkerPool
from splitonnx.runtime.workers.processes import WorkerOptions

DEFAULT_PORT = 8765
HALT_SECONDS = 5.0
"""Seconds in which a server must end running steps and write its sessions after a second signal."""
HALTED = 130
"""Exit code of a server that did not finish within that time."""
FILES = 256
"""File descriptors needed besides connections, mostly for worker processes and checkpoints."""
SCARCITY = (
    "%d connections refused: no file descriptor is left for more, of %d that this process may "
    "have; raise the limit (ulimit -n, LimitNOFILE=), or lower --max-clients"
)

_logger = logging.getLogger("splitonnx.server")


class Server:
    """A server that trains a bundle's server part together with clients over websockets.

    Call :meth:`serve_forever`, or use the server as a context manager, which serves in a thread
    while the context is open::

        with Server("bundle/server", port=0) as server:
            Client("bundle/client", server.url).fit(data)

    Each client has its own session, which starts from the folder's state and outlives the client's
    connections.  The same port answers ``GET /health``, ``GET /metrics``, ``GET /sessions``,
    ``GET /states/...`` and ``GET /client/...``.

    Args:
        bundle: the server's folder, or the server's part if it is already loaded.
        host: the address to listen on.
        port: the port to listen on; 0 selects any free port.
        threads: number of threads per operator; by default, all cores are used.
        provider: what computes the stages; see :class:`~splitonnx.runtime.client.clients.Client`.
        resume: resume the sessions that an earlier server left in the folder.
        limits: the server's limits.
        tokens: the accepted tokens; without them, every client is admitted.
        tls: the TLS context, from :func:`~splitonnx.runtime.wire.tls.make_server_tls`.
        origins: web origins that may connect, such as ``https://example.org``.
        insecure: listen on the network even if neither tokens nor certificates are required.
        client: the client's folder or loaded part, which browsers may download.
        web: a folder of web pages to serve, with ``index.html`` at the path ``/``.  These pages may
            connect to the server at any of its addresses.
        isolate: run the stages of each owner's sessions in a separate process; on by default if
            clients must show tokens or certificates, or can connect over the network.
        keep_sessions: days after which the checkpoints and outcomes of unused sessions are deleted,
            except for the newest outcome; ``None`` to keep them forever.
        policy: how the server joins what its clients learn; by default, it does not.

    Raises:
        BundleError, FormatError: a folder cannot be used.
        FolderInUse: another server is using the folder.
        UsageError: ``bundle`` is not a server's part, ``client`` does not belong to it, unknown
            clients could connect over the network, or another argument is invalid.
        WrongRuntime, StageFailed: a stage cannot be loaded, or the provider does not start.
    """

    def __init__(
        self,
        bundle: str | Path | PartyBundle,
        *,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        threads: int | None = None,
        provider: str = CPU,
        resume: bool = False,
        limits: Limits | None = None,
        tokens: Tokens | None = None,
        tls: ssl.SSLContext | None = None,
        origins: Sequence[str] = (),
        insecure: bool = False,
        client: str | Path | PartyBundle | None = None,
        web: str | Path | None = None,
        isolate: bool | None = None,
        keep_sessions: float | None = None,
        policy: PolicyOptions | None = None,
    ) -> None:
        if keep_sessions is not None and not 0 < keep_sessions < math.inf:
            raise UsageError(f"sessions are kept for a number of days, not {keep_sessions:g}")
        path = bundle.path if isinstance(bundle, PartyBundle) else Path(bundle)
        self._lock = None if path is None else FolderLock.acquire(path)
        with ExitStack() as undo:
            if self._lock is not None:
                undo.callback(self._lock.release)
            party = (
                bundle
                if isinstance(bundle, PartyBundle)
                else PartyBundle.load(bundle, is_held=True)
            )
            if party.manifest.party != SERVER:
                raise UsageError(f"this is the {party.manifest.party}'s part; serve the server's")
            _check_room(policy, limits or Limits())
            check_exposure(host, tokens, tls, insecure=insecure)
            pages = None if web is None else read_pages(Path(web))
            self.host, self.port = host, port
            self._limits = limits or Limits()
            self._tokens = tokens
            self._tls = tls
            self._origins = tuple(origins)
            self._engine = Engine(
                threads, provider=provider, stage_seconds=self._limits.stage_seconds
            )
            self._metrics = Metrics(phase.name for phase in party.manifest.phases)
            if isolate is None:
                asks = tls is not None and tls.verify_mode is ssl.CERT_REQUIRED
                isolate = tokens is not None or asks or not is_loopback(host)
            self._workers = None
            if isolate:
                shared = SharedTensors.make(party.weights)
                if shared is not None:
                    party = replace(party, weights=shared.tensors)
                self._workers = self._make_workers(party, shared, threads)
            self._registry = Registry(
                Executor(party, self._engine, norm=self._limits.norm, renews=True),
                sessions=self._limits.sessions,
                sessions_per_owner=self._limits.sessions_per_token,
                memory_bytes=self._limits.memory,
                unattended_seconds=self._limits.unattended_seconds,
                resume=resume,
                workers=self._workers,
                disk_per_owner=self._limits.disk_per_owner,
                keep_seconds=None if keep_sessions is None else keep_sessions * DAY,
                joins=policy,
            )
            self._leaving = describe_step(list_sent(party.manifest, TRAIN))
            self._estimates = Estimates(party.manifest, party.graphs)
            self._compute = Turns(name="splitonnx-compute")
            self._storage = Turns(name="splitonnx-storage")
            self._responder = Responder(
                self._registry,
                self._metrics,
                is_stopping=self._is_stopping,
                storage=self._storage,
                client_files=None if client is None else ClientFiles(client, party.manifest),
                pages=pages,
            )
            self._connections: set[asyncio.Task[None]] = set()
            self._scarcity = Rarely(time.monotonic)
            self._loop: asyncio.AbstractEventLoop | None = None
            self._stop: asyncio.Event | None = None
            self._thread: threading.Thread | None = None
            self._halt: threading.Timer | None = None
            undo.pop_all()

    def _make_workers(
        self, party: PartyBundle, weights: SharedTensors | None, threads: int | None
    ) -> WorkerPool:
        limits = self._limits
        options = WorkerOptions(
            party=party,
            weights=weights,
            threads=threads,
            provider=str(self._engine.provider),
            stage_seconds=limits.stage_seconds,
            memory_bytes=limits.memory + limits.tasks + GIB,
            kept_bytes=limits.tasks // 2,
            norm=limits.norm,
        )
        return WorkerPool(
            options, workers=limits.workers, on_death=self._metrics.count_worker_death
        )

    @property
    def url(self) -> str:
        """Return the URL under which clients on this machine reach the server."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        scheme = "ws" if self._tls is None else "wss"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def serve_forever(self) -> None:
        """Serve until SIGINT or SIGTERM arrives, then finish the running steps and stop.

        A second signal stops the stages that are still running.  If stopping then takes longer than
        ``HALT_SECONDS``, the process ends with exit code 130.

        Raises:
            PortInUse: another program is using the port.
            KeyboardInterrupt: a second signal arrived, and the sessions were written to disk.
        """
        raise_limit(self._limits.clients + 2 * self._limits.unauthenticated + FILES)
        keep_buffers()
        exempt_loaded()
        try:
            event_loops.run(self._run(handle_signals=True))
        finally:
            self._unlock()
        if self._halt is not None:
            self._halt.cancel()
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run_in_thread, args=(started,), daemon=True)
        self._thread.start()
        started.result()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the running steps, abort other tasks and stop; may be called twice."""
        if self._thread is not None and self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._thread = None
        self._compute.close()
        self._storage.close()
        self._engine.stop()
        if self._workers is not None:
            self._workers.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _run_in_thread(self, started: Future[None]) -> None:
        try:
            event_loops.run(self._run(started=started))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _run(
        self, *, handle_signals: bool = False, started: Future[None] | None = None
    ) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        context = ServerContext(
            registry=self._registry,
            compute=self._compute,
            storage=self._storage,
            metrics=self._metrics,
            stop=self._stop,
            tokens=self._tokens,
            norm=self._limits.norm,
            batch=self._limits.batch,
            estimates=self._estimates,
            budget=Budget(
                self._limits.tasks,
                workers=None if self._workers is None else self._limits.workers,
                is_there=self._has_session,
            ),
        )
        if handle_signals:
            self._handle_signals(self._loop, context)
        async with serve(
            partial(self._serve_connection, context),
            self.host,
            self.port,
            limits=self._limits,
            tls=self._tls,
            origins=self._origins,
            authorize=None if self._tokens is None else self._tokens.find,
            respond=self._responder.respond,
            has_pages=self._responder.has_pages,
            on_refusal=self._note_refusal,
        ) as port:
            self.port = port
            _logger.info("serving on %s", self.url)
            for sentence in (self._leaving, *self._registry.policy.terms().describe()):
                _logger.info("%s", sentence)
            if self._responder.has_pages:
                _logger.info("the page is at %s/", self.url.replace("ws", "http", 1))
            _logger.info("%s", event_loops.describe())
            if started is not None:
                started.set_result(None)
            ticking = asyncio.create_task(keep_ticking(context))
            await self._wait_for_stop(context)
            await ticking
            if self._connections:
                await asyncio.wait(self._connections)
        await context.storage.run(self, self._registry.unload_all)
        if self._workers is not None:
            await context.storage.run(self, self._workers.close)
        _logger.info("stopped")

    def _has_session(self, user: Hashable) -> bool:
        """Return whether ``user`` is an owner, or a session without an owner, that is in memory."""
        return any(user in (session.owner, session.id) for session in self._registry.sessions)

    def _handle_signals(self, loop: asyncio.AbstractEventLoop, context: ServerContext) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, self._take_signal, context)
            except NotImplementedError:  # Windows has no such handlers, but a signal wakes the loop
                take = partial(loop.call_soon_threadsafe, self._take_signal, context)
                signal.signal(number, lambda *_, take=take: take())

    def _take_signal(self, context: ServerContext) -> None:
        """Stop at the first signal; at the second, end running stages."""
        if not context.stop.is_set():
            context.stop.set()
        elif self._halt is None:
            _logger.warning("stopping at once: running stages are ended")
            self._halt = threading.Timer(HALT_SECONDS, os._exit, (HALTED,))
            self._halt.daemon = True
            self._halt.start()
            context.halt.set()
            self._engine.stop()
            if self._workers is not None:
                self._workers.interrupt()

    async def _wait_for_stop(self, context: ServerContext) -> None:
        """Unload sessions without a connection repeatedly until the server stops."""
        interval = min(60.0, self._limits.unattended_seconds / 2)
        while not context.stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(context.stop.wait(), interval)
            await asyncio.to_thread(self._registry.unload_idle)
            if self._workers is not None:
                retire = partial(self._workers.retire_idle, self._limits.unattended_seconds)
                await context.storage.run(self, retire)
        _logger.info("stopping: steps that run are finished first")

    async def _serve_connection(self, context: ServerContext, peer: Peer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        await ConnectionHandler(context, peer).run()

    def _is_stopping(self) -> bool:
        return self._stop is None or self._stop.is_set()

    def _note_refusal(self, refusal: Refusal, name: str) -> None:
        self._metrics.count_refusal(refusal)
        if refusal is Refusal.TOO_MANY_FILES:
            if count := self._scarcity.count():
                _logger.warning(SCARCITY, count, find_limit(), extra={"reason": str(refusal)})
            return
        _logger.warning(
            "%s refused: %s", name, refusal, extra={"peer": name, "reason": str(refusal)}
        )


def _check_room(policy: PolicyOptions | None, limits: Limits) -> None:
    """Check that as many clients can come as the policy's first round waits for."""
    if policy is not None and policy.clients_min > limits.sessions:
        reason = f"the first round waits for {policy.clients_min} clients"
        raise UsageError(f"{reason}; raise --max-sessions, which is {limits.sessions}")
