"""How good the estimate of a task's memory is: against the peak of a process that runs the task.

Each case trains and predicts one batch in a process of its own: first a batch of one row, then
the case's; what the peak of resident memory has grown by is held against what
``runtime/engine/estimates.py`` says of the graphs.  A good estimate is at most twice the measured
peak, give or take 4 MiB, and never less than 88 % of it.  The script exits with 1 where one is not.

    python -m benchmarks.task_memory [NAME ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from splitonnx.bundles import PartyBundle
from splitonnx.messages import TaskKey
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.estimates import Estimates
from splitonnx.runtime.engine.executors import Executor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from resnets import build_resnet18
from transformers import build_transformer

from tests.support.zoo import ZOO

MIB = 1 << 20
SLACK = 4 * MIB
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model whole, its data by number of rows, its loss, and the batches to try."""

    build: Callable[[], onnx.ModelProto]
    data: Callable[[int], Arrays]
    batches: tuple[int, ...]
    loss: str = "cross-entropy"


def _draw(shape: tuple[int, ...]) -> Callable[[int], Arrays]:
    def draw(rows: int) -> Arrays:
        random = np.random.default_rng(1)
        images = random.standard_normal((rows, *shape), np.float32)
        return {"x": images, "labels": random.integers(0, 10, rows)}

    return draw


def _take(name: str, *batches: int) -> Case:
    entry = ZOO[name]
    return Case(
        build=entry.build, data=lambda rows: entry.data(rows), batches=batches, loss=entry.loss
    )


CASES: Mapping[str, Case] = {
    "resnet18": Case(
        build=lambda: build_resnet18(32), data=_draw((3, 32, 32)), batches=(8, 32, 96)
    ),
    "transformer": Case(build=build_transformer, data=_draw((64, 64)), batches=(32, 128, 512)),
    "convolutions": _take("convolutions", 4096, 16384),
    "pools": _take("pools", 4096, 16384),
    "upsampling": _take("upsampling", 4096),
    "attention": _take("attention", 8192, 32768),
    "batchnorm_trained": _take("batchnorm_trained", 8192),
    "dropout": _take("dropout", 8192),
    "embedding": _take("embedding", 65536),
    "chain": _take("chain", 262144),
}


def read_status(field: str) -> int:
    """Read a line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def run_task(executor: Executor, phase: str, step: int, data: Arrays) -> None:
    key = TaskKey("s", phase, step, 0)
    executor.begin(key, data=data, seed=0, learning_rate=1e-4)
    list(executor.advance(key))
    executor.finish(key)


def measure(folder: Path, phase: str, case: Case, rows: int) -> int:
    """Run a task in this process; return by how much it grew beyond one of a single row."""
    executor = Executor(PartyBundle.load(folder), Engine(2))
    run_task(executor, phase, 0, case.data(1))
    data = case.data(rows)
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    run_task(executor, phase, executor.step, data)
    return read_status("VmHWM") - before + sum(array.nbytes for array in data.values())


def compare(folder: Path, name: str, target: str) -> Iterator[tuple[str, int, int]]:
    """Yield what was tried, the estimate and the measured bytes."""
    case = CASES[name]
    party = cut(case.build(), at=None, loss=case.loss, client_target=target).client  # type: ignore[arg-type]
    home = folder / f"{name}.{target}"
    party.save(home)
    estimates = Estimates(party.manifest, party.graphs)
    for rows in case.batches:
        sizes = {"N": rows, "batch": rows}
        for phase in ("train", "predict"):
            command = [sys.executable, __file__, "--run", str(home), phase, name, str(rows)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            yield f"{phase} {rows}", estimates.measure(phase, sizes), int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="cases; all by default")
    parser.add_argument("--run", nargs=4, metavar="PART", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        folder, phase, name, rows = options.run
        print(measure(Path(folder), phase, CASES[name], int(rows)))
        return
    import tempfile

    bad = 0
    print(
        "| model | target | task | estimate | measured | ratio |\n| - | - | - | --: | --: | --: |"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or CASES:
            for target in ("training", "portable"):
                for task, estimate, measured in compare(Path(folder), name, target):
                    ratio = estimate / measured
                    bad += not 0.88 * measured <= estimate <= 2 * measured + SLACK
                    print(
                        f"| {name} | {target} | {task} | {estimate / MIB:.0f} MiB | "
                        f"{measured / MIB:.0f} MiB | {ratio:.2f} |",
                        flush=True,
                    )
    if bad:
        raise SystemExit(f"{bad} estimates are off")


if __name__ == "__main__":
    main()
