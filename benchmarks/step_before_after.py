"""What a change costs: the split step of one checkout against that of another, in one run.

Each checkout cuts the model with its own code, serves it from a process of its own and steps from
another, over loopback.  Blocks of steps alternate between the two, so that a drifting machine
strikes both alike; the ratio is that of the medians, beside the spread of the pairs' ratios.  On a
machine that does other work, too, look at the quietest tenth of the steps, and at the time that
client and server compute together.

``wire`` computes almost nothing and moves 1 MiB each way, so the ratio shows what the runtime
costs by itself; ``resnet`` is ``resnets.py``'s ResNet-18, as a user would see it.

    python benchmarks/step_before_after.py BEFORE AFTER [--model wire] [--pairs 200] [--tail]

BEFORE and AFTER are folders with a checkout, such as git worktrees.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BATCH, WIDTH = 32, 8192
"""Of the model ``wire``: 32 x 8192 float32 are 1 MiB."""
STEPS = {"wire": 4, "resnet": 1}
"""Steps of one block."""
WARM_UP = {"wire": 40, "resnet": 2}
"""Steps before the first block."""


def build_wire() -> onnx.ModelProto:
    """A wide and shallow model: scale, cut at ``scaled``, scale again, ten sums of all."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = random.standard_normal(shape, np.float32) / np.sqrt(np.float32(WIDTH))
        return numpy_helper.from_array(values, name)

    nodes = [
        helper.make_node("Mul", ["x", "w0"], ["scaled"], name="scale"),
        helper.make_node("Mul", ["scaled", "w1"], ["again"], name="again"),
        helper.make_node("MatMul", ["again", "w2"], ["logits"], name="sum"),
    ]
    graph = helper.make_graph(
        nodes,
        "wire",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [weight("w0", WIDTH), weight("w1", WIDTH), weight("w2", WIDTH, 10)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def work(model: str, tail: bool, threads: int | None) -> None:
    """Step as often as a line on stdin says; runs in a checkout.

    Each time, it prints the seconds of each step, and those that client and server computed in all.
    """
    from splitonnx import Client
    from splitonnx.partitioner.partitions import cut

    random = np.random.default_rng(1)
    batch: dict[str, np.ndarray]
    if model == "wire":
        batch = {"x": random.standard_normal((BATCH, WIDTH), np.float32)}
        bundle = cut(build_wire(), at="scaled", tail_at="again" if tail else ())
    else:
        from resnets import build_resnet18

        batch = {"x": random.standard_normal((BATCH, 3, 32, 32), np.float32)}
        bundle = cut(build_resnet18(64), at="stage0", tail_at="pool" if tail else ())
    batch["labels"] = random.integers(0, 10, BATCH)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        bundle.save(Path(scratch, "bundle"))
        server, url = stack.enter_context(_serve(Path(scratch, "bundle/server"), threads))
        client = stack.enter_context(Client(bundle.client, url, threads=threads))
        for line in sys.stdin:
            seconds, begun = [], _read_busy(server)
            for _ in range(int(line)):
                start = time.perf_counter()
                client.step(batch)
                seconds.append(time.perf_counter() - start)
            print(json.dumps([seconds, _read_busy(server) - begun]), flush=True)


@contextmanager
def _serve(folder: Path, threads: int | None) -> Iterator[tuple[int, str]]:
    command = [sys.executable, "-m", "splitonnx", "serve", str(folder), "--port", "0"]
    command += [] if threads is None else ["--threads", str(threads)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            yield process.pid, "ws://" + line.split("ws://")[1].split(",")[0].strip()
        finally:
            process.terminate()
            process.communicate()


def _read_busy(server: int) -> float:
    """Read the processor time of this process and of the server's, in seconds; 0 outside Linux."""
    status = Path(f"/proc/{server}/stat")
    if not status.exists():
        return 0.0
    user, system = status.read_text().rpartition(")")[2].split()[11:13]
    return time.process_time() + (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Worker:
    """A process that steps with a checkout's code."""

    def __init__(self, checkout: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--work", "--model"]
        command += [options.model, *(["--tail"] if options.tail else [])]
        command += [] if options.threads is None else ["--threads", str(options.threads)]
        self._process = subprocess.Popen(
            command,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def step(self, count: int) -> tuple[list[float], float]:
        """Take so many steps; return the seconds of each, and the processor's in all."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(count, file=self._process.stdin, flush=True)
        seconds, busy = json.loads(self._process.stdout.readline())
        return seconds, busy


def compare(options: argparse.Namespace) -> float:
    """Step in turn with both checkouts, print the figures, and return the ratio of medians."""
    count, seconds, ratios = STEPS[options.model], (list[float](), list[float]()), list[float]()
    busy = [0.0, 0.0]
    with Worker(options.before, options) as before, Worker(options.after, options) as after:
        workers = (before, after)
        for worker in workers:
            worker.step(WARM_UP[options.model])
        for pair in range(options.pairs):
            order = (0, 1) if pair % 2 else (1, 0)
            blocks = {side: workers[side].step(count) for side in order}
            for side, (block, computed) in blocks.items():
                seconds[side].extend(block)
                busy[side] += computed
            ratios.append(statistics.median(blocks[1][0]) / statistics.median(blocks[0][0]))
    for name, times, computed in zip(("before", "after"), seconds, busy, strict=True):
        low, middle, high = np.percentile(times, [10, 50, 90]) * 1000
        print(
            f"{name:6} step  {middle:8.2f} ms  ({low:.2f} to {high:.2f}, 10 % to 90 %), "
            f"{computed / len(times) * 1000:.2f} ms of processor"
        )
    middles = [np.percentile(times, [10, 50]) for times in seconds]
    quiet, ratio = middles[1] / middles[0]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    print(
        f"after / before  {ratio:.3f}  ({quiet:.3f} in the quietest tenth, "
        f"{busy[1] / busy[0]:.3f} of processor; {middle:.3f} by pairs, {low:.3f} to {high:.3f} in "
        f"the middle half of {options.pairs} pairs of {count} steps)"
    )
    return float(ratio)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("before", type=Path, nargs="?", help="a folder with a checkout")
    parser.add_argument("after", type=Path, nargs="?", help="another")
    parser.add_argument("--model", choices=sorted(STEPS), default="wire")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of blocks that count")
    parser.add_argument("--tail", action="store_true", help="U-shaped: labels on the client")
    parser.add_argument("--threads", type=int, help="threads of one operator")
    parser.add_argument("--limit", type=float, help="exit code 1 where the ratio is larger")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.model, options.tail, options.threads)
        return 0
    if options.before is None or options.after is None:
        parser.error("name the two checkouts")
    ratio = compare(options)
    return int(options.limit is not None and ratio > options.limit)


if __name__ == "__main__":
    sys.exit(main())
