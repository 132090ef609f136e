"""The server's side of a worker process: start it, send it requests, and read its answers.

The server and the worker share two blocks of memory.  A worker handles one request at a time.  The
requests are defined in :mod:`messages`; :mod:`pools` decides which owner has which worker.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO, TypeVar

import msgspec
import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import FormatError, ProcessFailed, SplitonnxError, StageStopped
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.manifests import encode_manifest
from splitonnx.messages import TaskKey
from splitonnx.runtime.engine.runs import GRACE_SECONDS, Runs
from splitonnx.runtime.workers import main as worker_main
from splitonnx.runtime.workers.blocks import (
    FileBlock,
    NamedBlock,
    SharedTensors,
    make_block,
    measure,
    put,
    take,
)
from splitonnx.runtime.workers.messages import (
    MAX_ANSWER,
    Action,
    Continue,
    Done,
    Failed,
    Finish,
    FromWorker,
    Given,
    Grown,
    Need,
    Request,
    Start,
    Tidy,
    Work,
    fill_slots,
    make_error,
    read_frame,
    write_frame,
)

MAX_BLOCK = 1 << 36
"""Size in bytes of the largest block that a worker may ask for."""
MAX_LINES = 20
"""Most lines of a worker's stderr that are logged."""
MAX_LINE = 300
"""Most characters of a logged line."""
START_SECONDS = 600.0
"""Seconds within which a worker must have loaded its bundle."""
END_SECONDS = 1.0
"""Seconds within which a worker must exit by itself; then it is killed."""
KEPT_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "DYLD_LIBRARY_PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "PATH",
    "SYSTEMROOT",
    "TEMP",
    "TMP",
    "TMPDIR",
)
"""Environment variables that a worker inherits; other variables may contain secrets."""

_T = TypeVar("_T")

_logger = logging.getLogger("splitonnx.server")
_answers = msgspec.msgpack.Decoder(FromWorker)


class WorkerEnded(Exception):
    """Raised if the worker process ended or had to be killed; ``how`` describes what happened.

    ``is_before`` is true if the process had already ended when the request was made.
    """

    def __init__(self, how: str, *, is_before: bool = False) -> None:
        super().__init__(how)
        self.how, self.is_before = how, is_before


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """The options that all workers of a server share.

    ``party`` is the party that the workers run.  ``weights`` are its weights in a shared file, or
    ``None`` if each worker gets its own copy.  ``memory_bytes`` limits each worker's memory, and
    ``norm`` the norm of decoded gradients.  After their tasks, all workers together may keep
    ``kept_bytes`` of freed private memory, and as much of what they share with the server.
    """

    party: PartyBundle
    weights: SharedTensors | None = None
    threads: int | None
    provider: str
    stage_seconds: float
    memory_bytes: int | None
    kept_bytes: int
    norm: float | None = None


class _Kill:
    """A substitute for run options: setting ``terminate`` kills the worker."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def terminate(self) -> bool:
        return self._process.poll() is not None

    @terminate.setter
    def terminate(self, _: bool) -> None:
        self._process.kill()


class Worker:
    """One worker process; the constructor returns when the process is ready for requests.

    ``is_alive`` becomes false when the process ends; its sessions are then lost.  ``kept_bytes`` is
    called for each request.  It returns how many bytes of freed memory the worker may keep after a
    task; the same number applies to the memory that the worker shares with the server.

    Raises:
        ProcessFailed: the process cannot be started, or does not become ready.
    """

    def __init__(self, options: WorkerOptions, kept_bytes: Callable[[], int]) -> None:
        self.is_alive = True
        self._is_running = self._is_interrupted = self._is_tidying = self._is_told = False
        self._kept_bytes = kept_bytes
        self._carried = 0  # bytes of the most tensors in one block since both were empty
        self._lock = threading.Lock()
        self._abandoned: deque[tuple[int, TaskKey]] = deque()
        self._closed: deque[int] = deque()
        with ExitStack() as undo:
            try:
                self._inbox = self._make_block(undo)
                self._outbox = self._make_block(undo)
                self._process = self._spawn(options.weights)
            except (OSError, ValueError) as error:
                raise ProcessFailed(worker_main.__name__, str(error)) from error
            undo.pop_all()
        self.pid = self._process.pid
        assert self._process.stderr is not None
        threading.Thread(
            target=_log_lines,
            args=(self._process.stderr, self.pid),
            name="splitonnx-worker-log",
            daemon=True,
        ).start()
        self._runs = Runs(START_SECONDS)
        try:
            self._start(options)
        except (WorkerEnded, SplitonnxError) as error:
            self.end()
            raise ProcessFailed(worker_main.__name__, str(error)) from error
        self._runs.stop()
        # several stages may run in one request, each within its own limit
        most = max(len(phase.stages) for phase in options.party.manifest.phases)
        self._runs = Runs(most * (options.stage_seconds + 2 * GRACE_SECONDS))

    def ask(
        self, action: Action, tensors: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray] | Done:
        """Send a request to the worker, wait for its answer and return it.

        ``tensors`` are copied to shared memory, and the action is sent with their positions.

        Raises:
            WorkerEnded: the process ended because of the request, or had ended before.
            SplitonnxError: the action failed; the worker can usually continue.
        """
        with self._lock:
            if not self.is_alive:
                raise WorkerEnded("it had ended before", is_before=True)
            self._is_told = False
            self._is_running = isinstance(action, Work | Continue)
            try:
                if self._is_running and self._is_interrupted:
                    raise StageStopped("of the task")
                run = self._runs.begin("of a worker", _Kill(self._process))
                try:
                    return self._exchange(action, tensors)
                finally:
                    self._runs.finish(run)
            except (EOFError, OSError, FormatError, *JSON_ERRORS) as error:
                raise WorkerEnded(self._bury(error), is_before=not self._is_told) from error
            except BaseException as error:
                if not isinstance(error, SplitonnxError) or not self.is_alive:
                    self._bury(error)  # the pending answer would be taken for the next one
                raise
            finally:
                self._is_running = False

    def abandon(self, session: int, key: TaskKey) -> None:
        """Make the worker drop a task as soon as it has answered the current request."""
        self._abandoned.append((session, key))
        self.tidy()

    def forget(self, session: int) -> None:
        """Make the worker drop a session as soon as it has answered the current request."""
        self._closed.append(session)
        self.tidy()

    def tidy(self) -> None:
        """Make the worker release the memory that it is not allowed to keep.

        The worker first answers the current request.  This method returns at once, because the
        caller may be the event loop.
        """
        if self.is_alive and not self._is_tidying:
            self._is_tidying = True
            threading.Thread(target=self._tidy, name="splitonnx-tidy", daemon=True).start()

    def interrupt(self) -> None:
        """Stop the running stage and run no more stages; states can still be fetched.

        On Windows, the process is killed instead if a stage is running.
        """
        self._is_interrupted = True
        if not self._is_running:
            return
        if sys.platform == "win32":
            self._process.kill()
        else:
            self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Stop the process; if it is still busy after ``END_SECONDS``, kill it."""
        if not self._lock.acquire(timeout=END_SECONDS):
            self._process.kill()  # the thread with the lock gets an error and releases it
            self._lock.acquire()
        try:
            if self.is_alive:
                self.is_alive = False
                self._release()
        finally:
            self._lock.release()

    def _tidy(self) -> None:
        self._is_tidying = False  # from now on, another call starts another thread
        with suppress(WorkerEnded, SplitonnxError):  # the next user of the worker gets the error
            self.ask(Tidy())

    @staticmethod
    def _make_block(undo: ExitStack) -> FileBlock | NamedBlock:
        block = make_block()
        undo.callback(block.close)
        return block

    def _spawn(self, weights: SharedTensors | None) -> subprocess.Popen[bytes]:
        paths = [os.path.abspath(path) for path in sys.path]  # the same modules as here
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        blocks = (self._inbox, self._outbox)
        files = [block for block in blocks if isinstance(block, FileBlock)]
        numbers = [file.number for file in files]
        if weights is not None:
            numbers.append(weights.number)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", worker_main.__name__],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**kept, "PYTHONPATH": os.pathsep.join(paths)},
            cwd=sys.prefix,  # which is permanent
            pass_fds=numbers,
            start_new_session=sys.platform != "win32",  # only the server handles Ctrl-C
        )

    def _start(self, options: WorkerOptions) -> None:
        party, shared = options.party, options.weights
        start = Start(
            manifest=encode_manifest(party.manifest),
            graphs=dict(party.graphs),
            file=None if shared is None else shared.number,
            weights=() if shared is None else shared.slots,
            threads=options.threads,
            provider=options.provider,
            stage_seconds=options.stage_seconds,
            memory_bytes=options.memory_bytes,
            norm=options.norm,
        )
        self.ask(start, dict(party.weights) if shared is None else None)

    def _exchange(
        self, action: Action, tensors: Mapping[str, np.ndarray] | None
    ) -> dict[str, np.ndarray] | Done:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        if tensors is not None:
            self._reserve(self._inbox, measure(tensors.values()))
            action = fill_slots(action, put(self._inbox, tensors))
        request = Request(
            inbox=self._inbox.place,
            outbox=self._outbox.place,
            action=action,
            kept_bytes=self._kept_bytes(),
            abandoned=_drain(self._abandoned),
            closed=_drain(self._closed),
        )
        if self._process.poll() is not None:
            raise EOFError
        write_frame(requests, request)
        self._is_told = True
        while True:
            answer = _answers.decode(read_frame(answers, MAX_ANSWER))
            match answer:
                case Need(size=size):
                    if not 0 < size <= MAX_BLOCK:
                        raise FormatError("a worker's answer", f"it needs {size} bytes")
                    self._reserve(self._outbox, size)
                    write_frame(requests, Grown(outbox=self._outbox.place))
                case Given(tensors=slots):
                    given = take(self._outbox, slots)
                    self._carried = max(self._carried, measure(given.values()))
                    return given
                case Failed():
                    error = make_error(answer)
                    if answer.is_last:
                        self.is_alive = False
                    raise error
                case Done():
                    if isinstance(action, Finish | Tidy):
                        self._empty_blocks()
                    return answer

    def _reserve(self, block: FileBlock | NamedBlock, size: int) -> None:
        self._carried = max(self._carried, size)
        block.reserve(size)

    def _empty_blocks(self) -> None:
        if 2 * self._carried > self._kept_bytes():
            self._carried = 0
            self._inbox.empty()
            self._outbox.empty()

    def _bury(self, error: BaseException) -> str:
        """Make sure that the process has ended, and return how it ended."""
        self.is_alive = False
        code = self._release()
        if isinstance(error, (FormatError, *JSON_ERRORS)):
            return f"it answered what cannot be read: {error}"
        if code < 0:
            with suppress(ValueError):
                return f"it was ended by {signal.Signals(-code).name}"
        return f"it ended with exit code {code}"

    def _release(self) -> int:
        """Close the pipes, which ends the process, and return its exit code."""
        self._runs.stop()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._inbox.close()
        self._outbox.close()
        return code


def _drain(queue: deque[_T]) -> tuple[_T, ...]:
    return tuple(queue.popleft() for _ in range(len(queue)))


def _log_lines(stream: IO[bytes], pid: int) -> None:
    """Log the first lines that a worker writes to stderr, and discard the rest."""
    with stream, suppress(OSError, ValueError):
        for number, line in enumerate(iter(lambda: stream.readline(1 << 12), b"")):
            if number < MAX_LINES:
                text = line.decode("utf-8", "replace").rstrip()[:MAX_LINE]
                _logger.warning("worker %d: %s", pid, text)
