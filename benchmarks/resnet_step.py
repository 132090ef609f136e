"""What splitting costs: a ResNet-18's split step against its unsplit step, in one run.

CIFAR's shape (3x32x32), batch 32, width 64, cut after the first stage; client and server are two
processes on loopback that share the machine's cores, the unsplit step runs in the client's
process.  Steps alternate, so that a drifting machine strikes both alike; the ratio is the median
of the pairs' ratios.  Weights and data are random: time does not depend on them.

    python benchmarks/resnet_step.py [--pairs 15] [--width 64] [--tail]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from resnets import build_resnet18, serve

from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client

BATCH = 32


def measure(step: Callable[[], object]) -> float:
    """Time one call, in seconds."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


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
            serve(Path(folder, "bundle/server")) as url,
            Client(bundle.client, url) as split,
            Client(whole) as unsplit,
        ):
            for _ in range(2):
                split.step(batch), unsplit.step(batch)
            pairs = [
                (measure(lambda: split.step(batch)), measure(lambda: unsplit.step(batch)))
                for _ in range(options.pairs)
            ]
    times = np.array(pairs)
    ratios = times[:, 0] / times[:, 1]
    for name, column in (("split", times[:, 0]), ("unsplit", times[:, 1])):
        low, middle, high = np.percentile(column, [0, 50, 100]) * 1000
        print(f"{name:8} step  {middle:7.0f} ms  ({low:.0f} to {high:.0f})")
    print(
        f"split / unsplit  {np.median(ratios):.3f}  ({ratios.min():.3f} to {ratios.max():.3f}, "
        f"median of {options.pairs} pairs)"
    )


if __name__ == "__main__":
    main()
