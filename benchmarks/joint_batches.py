"""What it gives to run the batches of 32 clients as one, where they train one model.

The server has three full layers of 512, and each of 32 clients trains steps of 4 rows, in threads
of two processes.  With ``splitfed-v2``, the server makes a step for each client; with
``synchronous``, it makes one for all of them.  Both average the clients' parts after each step.
The script prints the samples per second of both, after the first step, and their ratio, and exits
with 1 if it is below 2.

    python benchmarks/joint_batches.py [--steps 30] [--pairs 3]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from many_clients import build_perceptron, serve

from splitonnx.names import SPLITFED_V2, SYNCHRONOUS
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client

CLIENTS, PROCESSES, BATCH = 32, 2, 4
INPUTS, CLASSES = 16, 10
WIDTHS = (INPUTS, INPUTS, 512, 512, 512, CLASSES)
"""Of a narrow layer for the client, and wide ones for the server."""
LEAST = 2.0


def train_many(folder: str, url: str, steps: int) -> None:
    """Train as a process's clients; print when the first step ended, and when the last did."""
    times: list[float] = []

    def train(number: int) -> None:
        random = np.random.default_rng(number)
        rows = BATCH * steps
        data: dict[str, np.ndarray] = {
            "x": random.standard_normal((rows, INPUTS), np.float32),
            "labels": random.integers(0, CLASSES, rows),
        }
        with Client(folder, url, threads=1, share=True) as client:
            client.fit(data, batch_size=BATCH, on_step=lambda step: times.append(time.monotonic()))

    threads = [
        threading.Thread(target=train, args=(number,)) for number in range(CLIENTS // PROCESSES)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(min(times), max(times))


def measure(folder: Path, policy: str, steps: int) -> float:
    """Return the samples per second of all clients, from start to end."""
    limits = [f"--max-{what}={CLIENTS}" for what in ("sessions", "sessions-per-token")]
    options = ["--policy", policy, "--clients-min", str(CLIENTS), *limits]
    with serve(folder / "server", options) as (_, url):
        words = [sys.executable, __file__, "--train"]
        words += [str(folder / "client"), url, "--steps", str(steps)]
        trainers = [
            subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)
        ]
        printed = [trainer.communicate()[0].split() for trainer in trainers]
    if any(trainer.returncode for trainer in trainers):
        sys.exit("a client failed")
    begun = min(float(first) for first, _ in printed)
    ended = max(float(last) for _, last in printed)
    return CLIENTS * BATCH * (steps - 1) / (ended - begun)


def main() -> int:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        folder, url = options.train
        train_many(folder, url, options.steps)
        return 0
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "bundle")
        cut(build_perceptron(WIDTHS), at="r0").save(folder)
        for _ in range(options.pairs):
            one, joint = (
                measure(folder, policy, options.steps) for policy in (SPLITFED_V2, SYNCHRONOUS)
            )
            ratios.append(joint / one)
            print(f"one by one {one:,.0f} samples a second, joint {joint:,.0f}: {ratios[-1]:.2f}")
    ratio = statistics.median(ratios)
    print(f"{CLIENTS} clients: {ratio:.2f} times the samples per second with joint batches")
    return int(ratio < LEAST)


if __name__ == "__main__":
    sys.exit(main())
