"""How soon a process is of use: the import, the first step of a client, and a cut of a ResNet-18.

The network has width 64 and CIFAR's shape (3x32x32); it is cut after the first stage, without a
tail and with one (a U-shape).  Each figure is taken over several processes of their own.  What
counts is the median of the wall time.  The least processor time, of a process and of those that it
started, is printed beside it: on a machine that does other work it says more.

    python benchmarks/start_up.py [--runs 5] [--only cut]

- ``import``: ``import splitonnx``, less the time of an interpreter that does nothing;
- ``first step``: from the start of the process, over ``import splitonnx`` and ``Client(...)``, to
  the end of ``Client.step`` with a batch of 32, less the time that it waits for the server;
- ``cut``: ``splitonnx cut``, and ``splitonnx.cut`` in Python with all its imports.

The exit code is 1 if a figure is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from resnets import build_resnet18, serve

WIDTH = 64
FIRST_STEP = """
import sys, time
import splitonnx
import numpy as np
from splitonnx.runtime.channels.channels import Channel

receive, waited = Channel.receive_wires, []

def wait(channel):
    start = time.perf_counter()
    try:
        return receive(channel)
    finally:
        waited.append(time.perf_counter() - start)

Channel.receive_wires = wait
random = np.random.default_rng(1)
images = random.standard_normal((32, 3, 32, 32), np.float32)
with splitonnx.Client(sys.argv[1], sys.argv[2]) as client:
    client.step({"x": images, "labels": random.integers(0, 10, 32)})
    print(sum(waited), flush=True)
    import os; os._exit(0)  # what follows is no part of the step
"""
CUT = "import sys, splitonnx; splitonnx.cut(sys.argv[1], at='stage0', {})"
VANILLA, U_SHAPED = ["--send-labels"], ["--tail-at", "pool"]


@dataclass(frozen=True, kw_only=True)
class Time:
    """The time that a process took, in seconds; ``waited`` is what it says itself."""

    wall: float
    processor: float
    waited: float = 0.0


def run(*command: str) -> Time:
    """Run Python with these arguments, and measure it and the processes that it starts."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    waited = float(printed) if printed.strip() else 0.0
    return Time(wall=wall, processor=usage.ru_utime + usage.ru_stime, waited=waited)


def measure_import(runs: int) -> list[Time]:
    """Measure the import less an interpreter that does nothing, each pair in turn."""
    pairs = [(run("-c", "import splitonnx"), run("-c", "pass")) for _ in range(runs)]
    idle = min(without.processor for _, without in pairs)
    return [
        Time(wall=with_it.wall - without.wall, processor=with_it.processor - idle)
        for with_it, without in pairs
    ]


def measure_first_step(folder: Path, runs: int) -> list[Time]:
    """Measure the first step of clients, each in a process of its own."""
    run("-m", "splitonnx", *_cut(folder, VANILLA), "--quiet")
    with serve(folder / "bundle/server") as url:
        times = []
        for _ in range(runs):
            taken = run("-c", FIRST_STEP, str(folder / "bundle/client"), url)
            times.append(Time(wall=taken.wall - taken.waited, processor=taken.processor))
        return times


def _cut(folder: Path, options: Sequence[str]) -> list[str]:
    bundle = str(folder / "bundle")
    return ["cut", str(folder / "model.onnx"), "--at", "stage0", *options, "-o", bundle, "--force"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5, help="processes for each figure")
    parser.add_argument("--only", default="", help="figures whose names contain this")
    options = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        onnx.save(build_resnet18(WIDTH), folder / "model.onnx")
        model = str(folder / "model.onnx")

        def repeat(*command: str) -> Callable[[], list[Time]]:
            return lambda: [run(*command) for _ in range(options.runs)]

        figures: list[tuple[str, float, Callable[[], list[Time]]]] = [
            ("import splitonnx", 0.1, lambda: measure_import(4 * options.runs)),
            ("first step", 1.0, lambda: measure_first_step(folder, options.runs)),
            ("splitonnx cut", 3.0, repeat("-m", "splitonnx", *_cut(folder, VANILLA), "--quiet")),
            (
                "splitonnx cut, U-shape",
                3.0,
                repeat("-m", "splitonnx", *_cut(folder, U_SHAPED), "--quiet"),
            ),
            ("cut() in Python", 3.0, repeat("-c", CUT.format("send_labels=True"), model)),
            ("cut() in Python, U-shape", 3.0, repeat("-c", CUT.format("tail_at='pool'"), model)),
        ]
        print(f"{'':26} median   range of wall time   least processor time   at most")
        for name, most, take in figures:
            if options.only not in name:
                continue
            times = take()
            walls = [time.wall for time in times]
            middle, least = statistics.median(walls), min(time.processor for time in times)
            print(
                f"{name:26} {middle:5.2f} s   {min(walls):5.2f} to {max(walls):5.2f} s   "
                f"{least:15.2f} s   {most:11.1f} s{'' if middle <= most else '   missed'}",
                flush=True,
            )
            missed += [name] if middle > most else []
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
