"""What isolation costs: a ResNet-18's split step with its server's stages in a worker and without.

CIFAR's shape (3x32x32), batch 32, width 64, cut after the first stage; each server is a process of
its own, and a client in this one steps with both over loopback.  Steps alternate, and which server
comes first, so that a drifting machine strikes both alike; the ratio is the median of the pairs'
ratios, beside that of the quietest tenth of each side's steps.  On a machine that does other work,
too, look at the processors' time: of client, server and worker together.

    python benchmarks/isolated_step.py [--pairs 30] [--width 64] [--tail] [--limit 1.10]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from resnets import build_resnet18, start_server

from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client

BATCH = 32
WARM_UP = 3
"""Steps before the first pair."""


def measure(client: Client, batch: dict[str, np.ndarray], server: int) -> tuple[float, float]:
    """Time one step, in seconds: of the clock, and of all processors."""
    start, busy = time.perf_counter(), read_busy(server)
    client.step(batch)
    return time.perf_counter() - start, read_busy(server) - busy


def read_busy(server: int) -> float:
    """Read how long this process, a server and its workers have computed (Linux alone)."""
    children = "".join(path.read_text() for path in Path(f"/proc/{server}/task").glob("*/children"))
    ticks = 0
    for process in (server, *map(int, children.split())):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure_pairs(options: argparse.Namespace) -> np.ndarray:
    """Time pairs of steps; first the worker's, then those in the server's own process."""
    random = np.random.default_rng(1)
    batch: dict[str, np.ndarray] = {
        "x": random.standard_normal((BATCH, 3, 32, 32), np.float32),
        "labels": random.integers(0, 10, BATCH),
    }
    model = build_resnet18(options.width)
    bundle = cut(model, at="stage0", tail_at="pool" if options.tail else ())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sides = []
        for name in ("--isolate", "--no-isolate"):
            bundle.save(Path(folder, name))
            server, url = stack.enter_context(start_server(Path(folder, name, "server"), name))
            sides.append((stack.enter_context(Client(bundle.client, url)), server))
        for client, _ in sides * WARM_UP:
            client.step(batch)
        pairs = []
        for number in range(options.pairs):
            order = (0, 1) if number % 2 else (1, 0)
            times = {side: measure(sides[side][0], batch, sides[side][1]) for side in order}
            pairs.append([times[0], times[1]])
    return np.array(pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=30, help="pairs of steps that count")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--tail", action="store_true", help="U-shaped: labels on the client")
    parser.add_argument("--limit", type=float, help="exit with 1 where the ratio is above it")
    options = parser.parse_args()
    measured = measure_pairs(options)
    for place, what in enumerate(("clock", "processors")):
        times = measured[:, :, place]
        for name, column in zip(("isolated", "in-process"), times.T, strict=True):
            low, middle, high = np.percentile(column, [0, 50, 100]) * 1000
            print(f"{what:10} {name:10} step  {middle:7.0f} ms  ({low:.0f} to {high:.0f})")
        ratios = times[:, 0] / times[:, 1]
        quiet = np.sort(times, axis=0)[: max(1, len(times) // 10)].mean(axis=0)
        print(
            f"{what:10} isolated / in-process  {np.median(ratios):.3f}  ({ratios.min():.3f} to "
            f"{ratios.max():.3f}; quietest tenth {quiet[0] / quiet[1]:.3f})"
        )
    ratio = float(np.median(measured[:, 0, 0] / measured[:, 1, 0]))
    return int(options.limit is not None and ratio > options.limit)


if __name__ == "__main__":
    sys.exit(main())
