"""The main program of a worker: a process that runs the stages of one owner's sessions.

The server starts the worker through :mod:`processes`.  The worker reads requests from stdin, writes
answers to its original stdout, and exits when the server exits.  The worker has the party's
bundle and the sessions of one owner, but no tokens, keys or sockets.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import assert_never

import msgspec
import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import SplitonnxError, StageFailed, StageStopped, StageTooSlow
from splitonnx.manifests import PartyManifest, decode_manifest
from splitonnx.messages import TaskKey
from splitonnx.names import ACCUMULATE, PREDICT, TRAIN, UPDATE
from splitonnx.runtime.engine.accelerators import LOGGER
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.workers.blocks import Block, Place, look_up, measure, open_block, put, take
from splitonnx.runtime.workers.heaps import Heap, exempt_loaded
from splitonnx.runtime.workers.messages import (
    Action,
    Continue,
    Done,
    Fetch,
    Finish,
    FromWorker,
    Given,
    Grown,
    Need,
    Open,
    Pipe,
    Request,
    Start,
    Tidy,
    Work,
    describe_error,
    read_frame,
    write_frame,
)

STUCK = 75
"""Exit code of a worker that exits because one of its stages does not stop."""

_requests = msgspec.msgpack.Decoder(Request)
_grown = msgspec.msgpack.Decoder(Grown)

_Wires = Iterator[dict[str, np.ndarray]]


class Host:
    """A worker's sessions, and the loop that answers the server's requests."""

    def __init__(self, inlet: Pipe, outlet: Pipe) -> None:
        self._inlet = inlet
        self._outlet = outlet
        self._inbox: Block | None = None
        self._outbox: Block | None = None
        self._base: Executor | None = None
        self._heap = Heap()
        self._seconds = 0.0
        self._sessions: dict[int, Executor] = {}
        self._advancing: dict[tuple[int, TaskKey], _Wires] = {}

    def serve(self) -> None:
        """Answer the server's requests until the server exits."""
        while True:
            try:
                request = _requests.decode(read_frame(self._inlet))
            except EOFError:
                return
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # it interrupts a stage
                answer = self._answer(request)
            except SplitonnxError as error:
                answer = describe_error(error)
            except MemoryError:
                reason = "it needs more memory than a worker may use; make the batch smaller"
                answer = describe_error(StageFailed("of the task", reason))
            except KeyboardInterrupt:
                answer = describe_error(StageStopped("of the task"))
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            write_frame(self._outlet, answer)

    def _answer(self, request: Request) -> FromWorker:
        self._inbox = open_block(request.inbox, self._inbox)
        self._outbox = open_block(request.outbox, self._outbox)
        for number, key in request.abandoned:
            self._advancing.pop((number, key), None)
            if number in self._sessions:
                self._sessions[number].abandon(key)
        for number in request.closed:
            self._sessions.pop(number, None)
        answer = self._act(request.action)
        if request.abandoned or request.closed or isinstance(request.action, Start | Finish | Tidy):
            self._heap.tidy(request.kept_bytes)
        return answer

    def _act(self, action: Action) -> FromWorker:
        match action:
            case Start():
                self._start(action)
                return Done()
            case Open():
                self._open(action)
                return Done()
            case Work():
                return self._work(action)
            case Continue():
                return self._advance(action.session, action.key)
            case Finish():
                self._sessions[action.session].finish(action.key)
                return Done()
            case Fetch():
                return self._give(self._sessions[action.session].state())
            case Tidy():
                return Done()
            case _:
                assert_never(action)

    def _start(self, start: Start) -> None:
        if start.memory_bytes is not None:
            _limit_memory(start.memory_bytes)
        manifest = decode_manifest(start.manifest, PartyManifest, "the server's manifest")
        self._seconds = start.stage_seconds
        engine = Engine(
            start.threads,
            provider=start.provider,
            arena=False,
            stage_seconds=start.stage_seconds,
            on_stuck=self._end_for_stuck,
        )
        self._base = Executor(self._find_party(start, manifest), engine, norm=start.norm)
        for phase in (TRAIN, PREDICT, ACCUMULATE, UPDATE):
            self._base.prepare(phase)

    def _find_party(self, start: Start, manifest: PartyManifest) -> PartyBundle:
        """Return the untrained party, with weights from an inherited file or the shared block."""
        if start.file is None:
            assert self._inbox is not None
            weights = take(self._inbox, start.weights)
        else:
            weights = look_up(start.file, start.weights)
        return PartyBundle(manifest=manifest, graphs=start.graphs, weights=weights)

    def _open(self, action: Open) -> None:
        assert self._base is not None
        assert self._inbox is not None
        for number, key in list(self._advancing):
            if number == action.session:
                del self._advancing[number, key]
        executor = self._base.fork()
        if action.state is not None:
            executor.restore(take(self._inbox, action.state), action.step)
        self._sessions[action.session] = executor

    def _work(self, action: Work) -> FromWorker:
        assert self._inbox is not None
        executor, key = self._sessions[action.session], action.key
        if action.begin is not None:
            begin = action.begin
            executor.begin(key, data={}, seed=begin.seed, learning_rate=begin.learning_rate)
        executor.deliver(key, take(self._inbox, action.wires))
        self._advancing[action.session, key] = executor.advance(key)
        return self._advance(action.session, key)

    def _advance(self, session: int, key: TaskKey) -> FromWorker:
        wires = next(self._advancing[session, key], None)
        if wires is not None:
            return self._give(wires)
        del self._advancing[session, key]
        executor = self._sessions[session]
        return Done(is_finished=executor.is_finished(key), is_waiting=executor.is_waiting(key))

    def _give(self, tensors: dict[str, np.ndarray]) -> Given:
        assert self._outbox is not None
        size = measure(tensors.values())
        if size > self._outbox.place.size:
            write_frame(self._outlet, Need(size=size))
            grown: Place = _grown.decode(read_frame(self._inlet)).outbox
            self._outbox = open_block(grown, self._outbox)
        return Given(tensors=put(self._outbox, tensors))

    def _end_for_stuck(self, stage: str) -> None:
        """Report to the server that a stage does not stop, and exit."""
        error = StageTooSlow(stage, self._seconds)
        write_frame(self._outlet, describe_error(error, is_last=True))
        os._exit(STUCK)


def _limit_memory(size: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most != resource.RLIM_INFINITY:
        size = min(size, most)
    resource.setrlimit(resource.RLIMIT_DATA, (size, most))


def _leave_no_core() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_server(number: int) -> None:
    """Exit as soon as the server closes its end of a pipe, even while a stage is running."""
    import select

    poll = select.poll()
    poll.register(number, 0)  # nothing but the other end's closing
    while not poll.poll():
        pass
    os._exit(0)


def _log_to_stderr(name: str) -> None:
    """Write a logger's messages to stderr, which the server reads and logs."""
    logger = logging.getLogger(name)
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.setLevel(logging.INFO)


def main() -> None:
    """Answer the requests of the server that started this process, until the server exits."""
    _leave_no_core()
    if sys.platform == "win32":
        import msvcrt

        for number in (0, 1):
            msvcrt.setmode(number, os.O_BINARY)
    # What else writes to stdout goes to the log.
    inlet, outlet = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until there is a stage to end
    if sys.platform == "linux":
        threading.Thread(target=_end_with_server, args=(inlet.fileno(),), daemon=True).start()
    exempt_loaded()
    _log_to_stderr(LOGGER)
    try:
        Host(inlet, outlet).serve()
    except (BrokenPipeError, KeyboardInterrupt):  # the server is gone, or is about to be
        os._exit(0)


if __name__ == "__main__":
    main()
