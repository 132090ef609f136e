"""Many clients at one server for long: its memory stays flat, nothing fails, steps stay quick.

A `splitonnx serve` process on loopback, and clients in threads of this process, each of which
trains a session of its own from beginning to end, saves, and begins the next.  The server's memory
(resident set, from /proc) is sampled all the while; what it says of itself comes from its metrics.
Exit code 1 where memory is not flat after the warm-up, a client saw an error, or the server logged
one.  For Linux.

    python benchmarks/soak.py [--minutes 30] [--clients 20]
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import SplitonnxError
from splitonnx.optimizers import AdamW
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client

FLAT = 0.05
"""Largest part by which the server's memory may vary after the warm-up."""
WARM_UP = 0.2
"""The part of the time that is warm-up."""
INTERVAL = 2.0
"""Seconds between two samples of memory."""
REPORT = 30.0
"""Seconds between two lines of progress."""
BATCH, FEATURES, WIDTH, CLASSES = 32, 64, 512, 10
"""Of the model: 64 KiB on the wire each way."""
SAMPLES, EPOCHS = 1600, 4
"""Of one session: 200 steps."""
EVERY = 50
"""Steps between checkpoints."""


def build_model() -> onnx.ModelProto:
    """A perceptron with a Dropout that is on: 64, 512 (cut), 512, 10."""
    random = np.random.default_rng(0)
    weights: list[onnx.TensorProto] = []

    def keep(name: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values, name))
        return name

    def draw(name: str, rows: int, columns: int) -> str:
        values = random.standard_normal((rows, columns), np.float32) / np.sqrt(np.float32(rows))
        return keep(name, values)

    ratio, on = keep("ratio", np.array(0.2, np.float32)), keep("on", np.array(True))
    nodes = [
        helper.make_node("MatMul", ["x", draw("w0", FEATURES, WIDTH)], ["linear0"], name="m0"),
        helper.make_node("Relu", ["linear0"], ["cut"], name="r0"),
        helper.make_node("MatMul", ["cut", draw("w1", WIDTH, WIDTH)], ["linear1"], name="m1"),
        helper.make_node("Relu", ["linear1"], ["hidden"], name="r1"),
        helper.make_node("Dropout", ["hidden", ratio, on], ["dropped"], name="d1"),
        helper.make_node("MatMul", ["dropped", draw("w2", WIDTH, CLASSES)], ["y"], name="m2"),
    ]
    graph = helper.make_graph(
        nodes,
        "soak",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@dataclass(kw_only=True)
class Tally:
    """What the clients did so far, together."""

    steps: int = 0
    sessions: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Crowd:
    """Clients in threads, which train session after session until they are told to stop."""

    def __init__(self, folder: Path, url: str, count: int) -> None:
        self.tally = Tally()
        self._folder = folder
        self._url = url
        self._stop = threading.Event()
        random = np.random.default_rng(1)
        self._data: dict[str, np.ndarray] = {
            "x": random.standard_normal((SAMPLES, FEATURES), np.float32),
            "labels": random.integers(0, CLASSES, SAMPLES),
        }
        self._threads = [
            threading.Thread(target=self._train_on, args=(number,)) for number in range(count)
        ]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _train_on(self, number: int) -> None:
        for session in itertools.count():
            if self._stop.is_set():
                return
            try:
                self._train(number, session)
            except SplitonnxError as error:
                with self.tally.lock:
                    self.tally.errors[f"{type(error).__name__}: {error}"] += 1

    def _train(self, number: int, session: int) -> None:
        """Train one session from untrained weights to the saved outcome."""
        place = Path(shutil.copytree(self._folder / "client", self._folder / f"client{number}"))
        try:
            with Client(place, self._url, threads=1, seed=number * 1000 + session) as client:
                for _ in range(EPOCHS):
                    history = client.fit(self._data, batch_size=BATCH, checkpoint_every=EVERY)
                    with self.tally.lock:
                        self.tally.steps += len(history.steps)
                    if self._stop.is_set():
                        return
                client.save()
            with self.tally.lock:
                self.tally.sessions += 1
        finally:
            shutil.rmtree(place)


@contextmanager
def serve(folder: Path, log: Path) -> Iterator[tuple[int, str]]:
    """Serve a folder from a process of its own; give its process id and its address."""
    command = [sys.executable, "-m", "splitonnx", "serve", str(folder), "--port", "0"]
    with (
        log.open("w+") as file,
        subprocess.Popen([*command, "--threads", "1"], stderr=file) as process,
    ):
        try:
            yield process.pid, _find_address(log, process)
        finally:
            process.terminate()
            process.wait()


def _find_address(log: Path, process: subprocess.Popen[bytes]) -> str:
    while process.poll() is None:
        _, found, rest = log.read_text().partition("ws://")
        if found and "\n" in rest:
            return found + rest.split()[0].rstrip(",")
        time.sleep(0.05)
    sys.exit(f"the server did not start: {log.read_text()}")


def read_memory(process: int) -> int:
    """Read a process' resident set, in bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def read_metrics(url: str) -> dict[str, float]:
    """Read a server's metrics: each sample's name with its labels, and its value."""
    with urllib.request.urlopen(url.replace("ws://", "http://") + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def find_quantile(metrics: dict[str, float], part: str, quantile: float) -> float:
    """Find below which of a histogram's bounds a part of all steps was done, in seconds."""
    start, end = 'splitonnx_step_seconds_bucket{le="', f'",part="{part}"}}'
    buckets = sorted(
        (float(name[len(start) : -len(end)]), count)
        for name, count in metrics.items()
        if name.startswith(start) and name.endswith(end)
    )
    total = buckets[-1][1]
    return next(bound for bound, count in buckets if count >= quantile * total)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "bundle")
        cut(build_model(), at="cut", optimizer=AdamW(lr=1e-3)).save(folder)
        log = Path(scratch, "server.log")
        with serve(folder / "server", log) as (process, url):
            with Crowd(folder, url, options.clients) as crowd:
                samples = watch(process, crowd.tally, options.minutes * 60)
            metrics = read_metrics(url)
            after = read_memory(process)
        return assess(samples, after, crowd.tally, metrics, log.read_text())


def watch(process: int, tally: Tally, seconds: float) -> list[tuple[float, int]]:
    """Sample memory for so long; return pairs of seconds and bytes."""
    start = reported = time.monotonic()
    samples: list[tuple[float, int]] = []
    while (now := time.monotonic()) - start < seconds:
        samples.append((now - start, read_memory(process)))
        if now - reported > REPORT:
            reported = now
            print(
                f"{now - start:6.0f} s  {samples[-1][1] / 1e6:7.1f} MB  {tally.steps} steps, "
                f"{tally.sessions} sessions, {tally.errors.total()} errors",
                flush=True,
            )
        time.sleep(INTERVAL)
    return samples


def assess(
    samples: list[tuple[float, int]],
    after: int,
    tally: Tally,
    metrics: dict[str, float],
    log: str,
) -> int:
    """Print the figures and return the exit code."""
    end = samples[-1][0]
    memory = np.array([size for second, size in samples if second >= WARM_UP * end]) / 1e6
    spread = (memory.max() - memory.min()) / np.median(memory)
    slope = np.polyfit(np.arange(len(memory)) * INTERVAL / 3600, memory, 1)[0]
    print(
        f"memory after {WARM_UP * end:.0f} s of warm-up: {memory.min():.1f} to {memory.max():.1f} "
        f"MB, {spread:.1%} (allowed {FLAT:.0%}), {slope:+.1f} MB an hour; "
        f"{after / 1e6:.1f} MB when all clients had left"
    )
    print(f"{tally.steps} steps in {tally.sessions} whole sessions")
    for part in ("receive", "compute", "send", "checkpoint"):
        bounds = [find_quantile(metrics, part, quantile) for quantile in (0.5, 0.99)]
        print(f"{part:10} p50 below {bounds[0] * 1e3:g} ms, p99 below {bounds[1] * 1e3:g} ms")
    for error, count in tally.errors.most_common(5):
        print(f"{count} x {error}")
    complaints = [line for line in log.splitlines() if "rror" in line or "Traceback" in line]
    print(*complaints[:5], sep="\n", end="\n" if complaints else "")
    good = spread <= FLAT and not tally.errors and not complaints
    print("good" if good else "NOT GOOD")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
