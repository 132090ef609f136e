"""Kill `splitonnx serve` or `splitonnx train` before each of its changes to a file, in turn.

    python -m tests.support.session_kills FOLDER server|client [STRIDE]

trains a tiny bundle split between two processes that keep checkpoints, again and again.  In the
n-th training one of them is killed before its n-th change of a file, and started again.  What came
of each is printed as JSON; a folder for each, with both parts, is left.
"""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from splitonnx import commands
from splitonnx.bundles import PartyBundle
from splitonnx.errors import SplitonnxError
from splitonnx.runtime.workers.heaps import exempt_loaded
from tests.support import tiny
from tests.support.tracing import Stop, trace

BATCH, STEPS, EVERY = 6, 6, 2
GIVE_UP_AFTER = 60  # seconds, for a client whose server does not come back
LOADED = (
    "onnxruntime",
    "splitonnx.runtime.client.clients",
    "splitonnx.runtime.server.servers",
    "stringprep",
)
"""What the forked processes would each import anew; it starts no thread."""

_CHANGES = {"write", "pwrite64", "writev", "fsync", "fdatasync", "ftruncate", "rename", "renameat",
            "renameat2", "mkdir", "mkdirat", "unlink", "unlinkat", "rmdir"}  # fmt: skip


class Training(msgspec.Struct, kw_only=True):
    """What came of a training: before which call one was killed, and how both parts stand."""

    killed_before: str
    steps: dict[str, int]
    states: dict[str, str]


def _serve(folder: Path, port: int, client_ends: int) -> None:
    """Serve until SIGTERM, or until the client is gone that holds the other end of a pipe."""
    threading.Thread(target=_stop_after, args=(client_ends,), daemon=True).start()
    _command("serve", folder / "server", "--port", port, "--threads", 1, "--resume", "--quiet")


def _stop_after(client_ends: int) -> None:
    os.read(client_ends, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _train(folder: Path, port: int) -> None:
    _command(
        *("train", folder / "client", "--data", folder / "data.npz", "--batch-size", BATCH),
        *("--server", f"ws://127.0.0.1:{port}", "--give-up-after", GIVE_UP_AFTER),
        *("--checkpoint-every", EVERY, "--threads", 1, "--resume", "--quiet"),
    )


def _command(*words: object) -> None:
    sys.argv = ["splitonnx", *map(str, words)]
    try:
        commands.main()
    except SystemExit as end:
        if end.code:
            raise


def _start(run: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    return child


def _find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _is_change(stop: Stop, place: str) -> bool:
    """Whether a call is about to change what is on disk of a party."""
    if stop.result is not None or not any(path.startswith(place) for path in stop.paths):
        return False
    return stop.call in _CHANGES or (stop.call == "openat" and bool(stop.arguments[2] & os.O_CREAT))


def _watch(run: Callable[[], None], place: str, number: int) -> Stop | None:
    """Kill before the change of that number and return it; ``None`` if it ended before."""
    changes = 0
    with closing(trace(run)) as watched:
        for stop in watched:
            changes += _is_change(stop, place)
            if changes == number:
                return stop
    return None


def _train_killing(folder: Path, side: str, number: int) -> Stop | None:
    """Train with one kill, to the end; return the call before which it came, if any did."""
    port, place = _find_port(), str(folder / side)
    reading, writing = os.pipe()

    def serve() -> None:
        if side == "client":
            os.close(writing)  # the client's is the last
        _serve(folder, port, reading)

    def train() -> None:
        _train(folder, port)

    client: int | None = None
    server: int | None = None
    if side == "server":
        client = _start(train)
        os.close(writing)
        killed = _watch(serve, place, number)
        if killed is not None:
            server = _start(serve)
    else:
        server = _start(serve)
        killed = _watch(train, place, number)
        if killed is not None:
            client = _start(train)
        os.close(writing)
    for name, process in (("client", client), ("server", server)):
        # a client that was done already stops its server before that has begun
        fine = (0, signal.SIGTERM) if name == "server" else (0,)
        if process is not None and (code := os.waitpid(process, 0)[1]) not in fine:
            raise RuntimeError(f"the {name} ended with {code} after a kill before {killed}")
    os.close(reading)
    return killed


def _describe(folder: Path, killed: Stop | None) -> Training:
    parts = {name: PartyBundle.load(folder / name) for name in ("client", "server")}
    states = {
        f"{name}/{tensor}": array.tobytes().hex()
        for name, part in parts.items()
        for tensor, array in part.state().items()
    }
    calls = [] if killed is None else [killed.call, *(Path(path).name for path in killed.paths)]
    return Training(
        killed_before=" ".join(calls),
        steps={name: part.step for name, part in parts.items()},
        states=states,
    )


def load_commands(folder: Path) -> None:
    """Import what the forked processes would each import anew, and let none collect it again."""
    for name in LOADED:
        importlib.import_module(name)
    missing = folder / "missing"
    data = ("--data", missing, "--batch-size", BATCH, "--server", "ws://127.0.0.1:1")
    for words in (("serve", missing, "--port", 0), ("train", missing, *data)):
        with suppress(SplitonnxError):  # what reads the words is loaded by its first use
            commands.app(list(map(str, words)), standalone_mode=False)
    assert threading.active_count() == 1
    exempt_loaded()


def run(folder: Path, side: str, stride: int) -> list[Training]:
    """Train with a kill before every change, or every ``stride``-th, and once without."""
    load_commands(folder)
    before = folder / "before"
    tiny.split_bundle().save(before)
    np.savez(before / "data.npz", **cast(Any, tiny.batch(0, BATCH * STEPS)))
    trainings = []
    for number in itertools.count(1, stride):
        target = folder / str(number)
        shutil.copytree(before, target)
        killed = _train_killing(target, side, number)
        trainings.append(_describe(target, killed))
        if killed is None:
            return trainings
    raise AssertionError


if __name__ == "__main__":
    print(
        msgspec.json.encode(run(Path(sys.argv[1]), sys.argv[2], int([*sys.argv, "1"][3]))).decode()
    )
