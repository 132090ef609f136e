"""What splitting costs: a ResNet-18's split step against its unsplit step, in one run.

CIFAR's shape (3x32x32), batch 32, width 64, cut after the first stage; client and server are two
processes on loopback that share the machine's cores, the unsplit step runs in the client's
process.  Pairs of steps alternate, so that a drifting machine strikes both alike; the ratio is the
median of the pairs' ratios.  Of two steps in a row the second counts: the server computes more
after its reply, which belongs to the split step, so the first one of each kind begins with what was
left of the other kind.  On Linux, the processor time of both parties is compared as well, which
other work on the machine hardly changes.  Weights and data are random: time does not depend on
them.

    taskset -c 0 python benchmarks/resnet_step.py [--pairs 15] [--width 64] [--tail]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from resnets import build_resnet18, start_server

from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client

BATCH = 32


def measure(step: Callable[[], object], server: int) -> tuple[float, float]:
    """Return the time and the processor time of the second of two calls, in seconds."""
    step()
    start, begun = time.perf_counter(), read_busy(server)
    step()
    return time.perf_counter() - start, read_busy(server) - begun


def read_busy(server: int) -> float:
    """Read the processor time of this process and the server's, in seconds; 0 outside Linux."""
    if sys.platform != "linux":
        return 0.0
    tasks = Path(f"/proc/{server}/task").glob("*/schedstat")
    return time.process_time() + sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps that count")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--tail", action="store_true", help="U-shaped: labels on the client")
    options = parser.parse_args()
    model = build_resnet18(options.width)
    random = np.random.default_rng(1)
    batch: dict[str, np.ndarray] = {
        "x": random.standard_normal((BATCH, 3, 32, 32), np.float32),
        "labels": random.integers(0, 10, BATCH),
    }
    bundle = cut(model, at="stage0", tail_at="pool" if options.tail else ())
    whole = cut(model, at=None).client
    with tempfile.TemporaryDirectory() as folder:
        bundle.save(Path(folder, "bundle"))
        with (
            start_server(Path(folder, "bundle/server")) as (server, url),
            Client(bundle.client, url) as split,
            Client(whole) as unsplit,
        ):
            for _ in range(2):
                split.step(batch), unsplit.step(batch)
            steps = (lambda: split.step(batch), lambda: unsplit.step(batch))
            pairs = [[measure(step, server) for step in steps] for _ in range(options.pairs)]
    found = np.array(pairs)
    for column, what in enumerate(("time", "processor time")[: 1 + found[..., 1].any()]):
        times = found[..., column]
        ratios = times[:, 0] / times[:, 1]
        for name, own in zip(("split", "unsplit"), times.T, strict=True):
            low, middle, high = np.percentile(own, [0, 50, 100]) * 1000
            print(f"{name:8} step  {middle:7.0f} ms  ({low:.0f} to {high:.0f}) of {what}")
        print(
            f"split / unsplit  {np.median(ratios):.3f}  ({ratios.min():.3f} to {ratios.max():.3f}, "
            f"median of {options.pairs} pairs) of {what}"
        )


if __name__ == "__main__":
    main()
