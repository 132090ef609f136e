"""What pipelining gains: a ResNet-18 on two cores, against one core and against two competitors.

CIFAR's shape (3x32x32), batch 32, width 64, AdamW.  The client has core 0 and the server core 1, on
loopback; the unsplit step runs in the client's process.  Beside them are
torch.distributed.pipelining (1F1B, gloo) and TorchSlicer (raw TCP, GPipe), each with the same
network, cut and cores, and PyTorch's own unsplit step.  Rounds alternate between all of them, so
that a drifting machine strikes all alike; who does not compute waits for a line from a pipe.  The
ratios are the medians of the rounds' ratios; where several numbers of micro-batches are measured,
the best of each side counts.

    python benchmarks/pipeline_step.py [--torch PYTHON] [--slicer PYTHON] [--cut s2b0end]

PYTHON is the interpreter of an environment with PyTorch, such as .venv-torch/bin/python (which
``make test-torch`` makes), and of one with PyTorch and torchslicer[grpc]==0.2.0 from PyPI; who is
not named is left out.  The exit code is 1 if a ratio is below the issue's.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
from resnets import build_resnet18, start_server

from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client

BATCH, WIDTH = 32, 64
CLIENT_CORE, SERVER_CORE = 0, 1
BLOCKS = {"stage0": 2, "s1b0end": 3, "stage1": 4, "s2b0end": 5, "stage2": 6}
"""Cuts, and how many residual blocks are before each."""
HERE = Path(__file__).parent
UNSPLIT, TORCH, TORCH_UNSPLIT, SLICER = "unsplit", "torch", "torch unsplit", "TorchSlicer"
WANTED = {UNSPLIT: 1.8, TORCH: 1.1, SLICER: 1.5}
"""Least ratios of our samples a second to theirs."""

Run = Callable[[int], float]
"""Makes a number of steps and returns the seconds that they took."""


def step(client: Client, batch: dict[str, np.ndarray], micro_batches: int) -> None:
    """Make a step of so many micro-batches."""
    client.step(batch, micro_batches=micro_batches)


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Bind this process to a core for a while; what is started meanwhile stays there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


PORTS = iter(range(20000 + os.getpid() % 5000 * 2, 32000, 2))
"""Below those that the system takes for outgoing connections; none is handed out twice."""


def find_ports(count: int) -> list[int]:
    """Return free ports, the number after each of which is free, too."""
    return [next(port for port in PORTS if is_free(port)) for _ in range(count)]


def is_free(port: int) -> bool:
    """Return whether a port and the next one can be listened on."""
    try:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
    except OSError:
        return False
    return True


@contextmanager
def start(core: int, *command: object, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process on a core, with a pipe each way; its log is in ``folder``."""
    single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL")}
    settings = {"EXPERIMENT_CONFIG": str(folder / "settings.yaml")}
    log = folder / f"log-{core}-{time.monotonic_ns()}.txt"
    with on_core(core), log.open("w") as errors:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, cwd=folder, env={**os.environ, **single, **settings},
        )  # fmt: skip
    with ExitStack() as ending:
        ending.callback(process.communicate)
        ending.callback(process.kill)
        ending.push(lambda kind, *_: kind and print(log.read_text()[-1000:], file=sys.stderr))
        yield process


def tell(processes: Sequence[subprocess.Popen[str]], line: str) -> float:
    """Write a line to each process, and return the number with which the first one answers."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    assert processes[0].stdout is not None
    answer = processes[0].stdout.readline()
    if not answer:
        raise RuntimeError(f"a process ended with {processes[0].wait()}")
    return float(json.loads(answer))


@contextmanager
def run_torch(python: str, blocks: int, folder: Path) -> Iterator[Callable[[int], Run]]:
    """Start PyTorch's two processes; yield a function of the number of micro-batches."""
    (port,) = find_ports(1)
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                start(
                    core, python, HERE / "pipeline_torch.py", rank, port, blocks, WIDTH, BATCH,
                    folder=folder,
                )
            )
            for rank, core in enumerate((CLIENT_CORE, SERVER_CORE))
        ]  # fmt: skip

        def run(micro_batches: int, steps: int) -> float:
            stepping = processes if micro_batches else processes[:1]
            return tell(stepping, f"{micro_batches} {steps}")

        yield lambda micro_batches: partial(run, micro_batches)


@contextmanager
def run_slicer(python: str, blocks: int, folder: Path, micro_batches: int) -> Iterator[Run]:
    """Start TorchSlicer's coordinator and workers for a number of micro-batches."""
    folder.mkdir()
    ports = find_ports(3)
    peers = [f"127.0.0.1:{port}" for port in ports[:2]]
    settings = {
        "training": {
            "epochs": 1,
            "optimizer": {"name": "AdamW", "params": {"lr": 1e-3}},
            "criterion": {"name": "CrossEntropyLoss", "params": {}},
        },
        "pipeline": {"use_gpipe": micro_batches > 1, "n_micro": micro_batches},
        "discovery": {"backend": "static", "n_workers": 2, "peers": peers},
        "transport": {"tensor": "tcp", "tensor_port_offset": 1},
        "network": {"device": "cpu"},
        "startup": {"worker_init_rpc_timeout_s": 60.0},
    }
    (folder / "settings.yaml").write_text(json.dumps(settings))  # JSON is YAML
    script = HERE / "pipeline_slicer.py"
    with ExitStack() as stack:
        for port, core in zip(ports, (CLIENT_CORE, SERVER_CORE), strict=False):
            stack.enter_context(start(core, python, script, "worker", port, folder=folder))
        for port in ports[:2]:
            wait_for(port)
        coordinator = stack.enter_context(
            start(
                CLIENT_CORE, python, script, "train", blocks, WIDTH, BATCH, ports[2], folder=folder
            )
        )
        tell([coordinator], "1")  # starting takes much of both cores
        yield lambda steps: tell([coordinator], str(steps))


def wait_for(port: int) -> None:
    """Wait until a port of this machine is listened on."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.2)
    raise RuntimeError(f"nothing listens on port {port}")


def read_busy(process: int) -> float:
    """Return the seconds that a process has computed so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def run_ours(
    at: str, folder: Path, busy: dict[int, list[list[float]]]
) -> Iterator[Callable[[int], Run]]:
    """Start a server; yield a function of the number of micro-batches, 0 for the unsplit step.

    ``busy`` gets the seconds that client and server compute for a step of so many micro-batches.
    """
    model, random = build_resnet18(WIDTH), np.random.default_rng(1)
    batch: dict[str, np.ndarray] = {
        "x": random.standard_normal((BATCH, 3, 32, 32), np.float32),
        "labels": random.integers(0, 10, BATCH),
    }
    bundle, whole = cut(model, at=at), cut(model, at=None).client
    bundle.save(folder / "bundle")
    with ExitStack() as stack:
        with on_core(SERVER_CORE):
            server, url = stack.enter_context(
                start_server(folder / "bundle/server", "--threads", "1")
            )
        stack.enter_context(on_core(CLIENT_CORE))
        split = stack.enter_context(Client(bundle.client, url, threads=1))
        unsplit = stack.enter_context(Client(whole, threads=1))

        def run(micro_batches: int, steps: int) -> float:
            begun, own = read_busy(server), time.process_time()
            start = time.perf_counter()
            for _ in range(steps):
                if micro_batches:
                    step(split, batch, micro_batches)
                else:
                    unsplit.step(batch)
            seconds = time.perf_counter() - start
            spent = [time.process_time() - own, read_busy(server) - begun]
            busy.setdefault(micro_batches, []).append([value / steps for value in spent])
            return seconds

        yield lambda micro_batches: partial(run, micro_batches)


def find_best(
    times: dict[tuple[str, int], np.ndarray], name: str, counts: Sequence[int]
) -> tuple[int, np.ndarray]:
    """Return the number of micro-batches with which someone is fastest, and the rounds' times."""
    found = {m: times[name, m] for m in counts if (name, m) in times}
    best = min(found, key=lambda m: float(np.median(found[m])))
    return best, found[best]


def compare(times: dict[tuple[str, int], np.ndarray]) -> bool:
    """Print the ratios, and return whether all those that were measured are high enough."""
    counts = sorted({m for _, m in times if m > 1})
    own, ours = find_best(times, "ours", counts)
    is_enough = True
    for name, wanted in WANTED.items():
        if not any(other == name for other, _ in times):
            print(f"{name}: not measured")
            continue
        best, theirs = find_best(times, name, [0] if name == UNSPLIT else [0, 1, *counts])
        ratio = float(np.median(theirs / ours))
        is_enough &= ratio >= wanted
        whom = name if not best else f"{name} with {best}"
        print(f"{own} micro-batches against {whom}: {ratio:.2f} times (at least {wanted})")
    for (name, m), taken in times.items():
        unsplit = {"ours": UNSPLIT, TORCH: TORCH_UNSPLIT}.get(name)
        if unsplit:
            low, middle, high = np.percentile(times[unsplit, 0] / taken, [0, 50, 100])
            print(f"{name} with {m} against {unsplit}: {middle:.2f} ({low:.2f} to {high:.2f})")
    return is_enough


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--torch", metavar="PYTHON", help="interpreter that has PyTorch")
    parser.add_argument("--slicer", metavar="PYTHON", help="interpreter that has TorchSlicer")
    parser.add_argument("--cut", default="s2b0end", choices=BLOCKS, help="where to cut")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count")
    parser.add_argument("--steps", type=int, default=3, help="steps in a row, of each in a round")
    options = parser.parse_args()
    counts, blocks = options.micro_batches, BLOCKS[options.cut]
    runs: dict[tuple[str, int], Run] = {}
    busy: dict[int, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        if options.torch:
            python = os.path.abspath(options.torch)
            make = stack.enter_context(run_torch(python, blocks, folder))
            runs.update({(TORCH, m): make(m) for m in counts})
            runs[TORCH_UNSPLIT, 0] = make(0)
        if options.slicer:
            python = os.path.abspath(options.slicer)
            for m in counts:
                place = folder / f"slicer-{m}"
                runs[SLICER, m] = stack.enter_context(run_slicer(python, blocks, place, m))
        make = stack.enter_context(run_ours(options.cut, folder, busy))
        runs.update({("ours", m): make(m) for m in counts})
        runs[UNSPLIT, 0] = make(0)
        for run in runs.values():
            run(2)
        busy.clear()
        taken = [[run(options.steps) for run in runs.values()] for _ in range(options.rounds)]
    times = dict(zip(runs, np.array(taken).T / options.steps, strict=True))
    for (name, m), values in times.items():
        low, middle, high = np.percentile(values, [0, 50, 100]) * 1000
        rate = BATCH / middle * 1000
        title = f"{name} with {m}" if m else name
        print(f"{title:18} {middle:6.0f} ms ({low:.0f} to {high:.0f}), {rate:5.1f} samples/s")
    for m, values in busy.items():
        client, server = np.median(values, axis=0) * 1000
        title = f"ours with {m}" if m else UNSPLIT
        print(f"{title:18} client computes {client:.0f} ms, server {server:.0f} ms")
    return 0 if compare(times) else 1


if __name__ == "__main__":
    raise SystemExit(main())
