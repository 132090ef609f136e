"""How a server serves 200 clients at once: fairly, and with how much memory for each.

A perceptron is cut in the middle; each client trains steps of 8 rows as fast as it is answered.
Several clients share a process, in which they are threads; the fewer, the less do they wait for
each other.  When all have begun, their steps are counted for some seconds.
The script prints the fewest and the most steps of a client, and the server's memory per session;
it exits with 1 if a client fails, or if the two are further apart than a tenth of the mean.

    python benchmarks/many_clients.py [--clients 200] [--processes 40] [--seconds 60] [OPTION ...]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client

BATCH, WIDTH, CLASSES = 8, 64, 10
MOST_APART = 0.1


def build_perceptron(widths: Sequence[int]) -> onnx.ModelProto:
    """Full layers between these widths, each but the last with a Relu."""
    random = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for index, (before, after) in enumerate(pairwise(widths)):
        weight = random.standard_normal((before, after), np.float32) / before**0.5
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{index}"], [f"m{index}"]))
        nodes.append(helper.make_node("Relu", [f"m{index}"], [f"r{index}"]))
        value = f"r{index}"
    graph = helper.make_graph(
        nodes[:-1],
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", widths[0]])],
        [helper.make_tensor_value_info(nodes[-2].output[0], TensorProto.FLOAT, ["N", widths[-1]])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def train_many(folder: str, url: str, clients: int, seconds: float) -> None:
    """Train as several clients; print each one's steps in the time that the starter sets."""
    counts, failed = [0] * clients, []
    begun, stop = threading.Barrier(clients + 1), threading.Event()

    def train(number: int) -> None:
        random = np.random.default_rng(number)
        data: dict[str, np.ndarray] = {
            "x": random.standard_normal((BATCH, WIDTH), np.float32),
            "labels": random.integers(0, CLASSES, BATCH),
        }
        try:
            with Client(folder, url, threads=1, share=True) as client:
                client.step(data)
                begun.wait()
                while not stop.is_set():
                    client.step(data)
                    counts[number] += 1
        except Exception as error:
            failed.append(error)
            begun.abort()
            raise

    threads = [threading.Thread(target=train, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    begun.wait()
    print("begun", flush=True)
    sys.stdin.readline()
    before = list(counts)
    time.sleep(seconds)
    print(*(after - earlier for after, earlier in zip(counts, before, strict=True)), flush=True)
    stop.set()
    for thread in threads:
        thread.join()
    sys.exit(bool(failed))


@contextmanager
def serve(folder: Path, options: list[str]) -> Iterator[tuple[int, str]]:
    """Serve in a process of its own; yield its number and address."""
    words = [sys.executable, "-m", "splitonnx", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = next(m for line in process.stderr if (m := re.search(r"wss?://[^\s,]+", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield process.pid, found.group()
        finally:
            process.terminate()


def measure_memory(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) * 1024


def run(clients: int, processes: int, seconds: float, options: list[str]) -> int:
    """Serve and train; print the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "bundle")
        cut(build_perceptron((*[WIDTH] * 4, CLASSES)), at="r1").save(folder)
        limits = [
            f"--max-{what}={clients}" for what in ("clients", "sessions", "sessions-per-token")
        ]
        with serve(
            folder / "server", [*limits, "--max-unauthenticated", str(clients), *options]
        ) as (pid, url):
            before = measure_memory(pid)
            trainers = [
                subprocess.Popen(
                    [sys.executable, __file__, "--train", str(folder / "client"), url,
                     "--clients", str(clients // processes), "--seconds", str(seconds)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )
                for _ in range(processes)
            ]  # fmt: skip
            for trainer in trainers:
                assert trainer.stdout is not None
                if trainer.stdout.readline() != "begun\n":
                    sys.exit("a client failed")
            memory = measure_memory(pid) - before
            for trainer in trainers:
                assert trainer.stdin is not None
                trainer.stdin.write("go\n")
                trainer.stdin.flush()
            printed = [trainer.communicate()[0] for trainer in trainers]
    if any(trainer.returncode for trainer in trainers):
        sys.exit("a client failed")
    steps = np.array([int(word) for line in printed for word in line.split()])
    apart = float((steps.max() - steps.min()) / steps.mean())
    print(
        f"{len(steps)} clients, {steps.sum() / seconds:,.0f} steps a second; steps of a client in "
        f"{seconds:g} s: {steps.min()} to {steps.max()}, {apart:.1%} of the mean apart; "
        f"{memory / len(steps) / 1024:,.0f} KiB of the server's memory a session"
    )
    return int(apart > MOST_APART)


def main() -> int:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--processes", type=int, default=40, help="which clients share evenly")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.train:
        folder, url = options.train
        train_many(folder, url, options.clients, options.seconds)
    return run(options.clients, options.processes, options.seconds, rest)


if __name__ == "__main__":
    sys.exit(main())
