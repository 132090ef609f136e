"""What a client needs, a benchmark: its arithmetic, and its client on a small net.

The networks that it is for take minutes.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import ROOT

pytestmark = pytest.mark.alone

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark is for Linux")

SECOND_STEP = """
import sys
from pathlib import Path
import numpy as np
from splitonnx.bundles import PartyBundle
from splitonnx.messages import TaskKey
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor

def read_peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

executor = Executor(PartyBundle.load(Path(sys.argv[1])), Engine(threads=1))
images = np.ones((64, 3, 32, 32), np.float32)
for step in range(3):
    key = TaskKey("a" * 32, "train", step, 0)
    data = {"x": images, "labels": np.zeros(64, np.int64)}
    executor.begin(key, data=data, seed=0, learning_rate=0.1)
    list(executor.advance(key))
    executor.finish(key)
    print(read_peak(), flush=True)
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("client_memory")


def make(benchmark: ModuleType, layers: int, **changes: float) -> Any:
    given = {"own": 0.1, "base": 80e6, "growth": 24e6, "allowance": 20e6, **changes}
    return benchmark.Figures(setting=benchmark.Setting(wire="int8"), layers=layers, **given)


@pytest.mark.parametrize(
    ("changes", "is_like"),
    [
        ({"own": 0.109}, True),
        ({"own": 0.111}, False),
        ({"own": 0.089}, False),
        ({"growth": 34e6}, True),
        ({"growth": 35e6}, False),
        ({"base": 95e6}, False),
    ],
)
def test_time_and_memory_may_differ_by_a_tenth(
    benchmark: ModuleType, changes: dict[str, float], is_like: bool
) -> None:
    assert make(benchmark, 64, **changes).is_like(make(benchmark, 4)) == is_like


def test_what_grows_and_what_needs_too_much_is_said(benchmark: ModuleType) -> None:
    figures = [make(benchmark, 4), make(benchmark, 16, growth=24.1e6), make(benchmark, 64, own=0.2)]
    assert list(benchmark.list_faults(figures)) == [
        "int8: 16 layers need more than 1.2 times the sum",
        "int8: 64 layers differ from 4",
    ]


def test_the_table_shows_every_client(benchmark: ModuleType) -> None:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(benchmark.tabulate([make(benchmark, 4), make(benchmark, 64)]))
    row = next(line for line in capture.get().splitlines() if " 64 " in line)
    for cell in ("int8", "100 ms", "80.0 MB", "24.0 MB", "20.0 MB", "1.20"):
        assert cell in row


def test_settings_are_named_as_options(benchmark: ModuleType) -> None:
    assert list(map(str, benchmark.SETTINGS)) == [
        "fp32", "int8", "int8, --accumulate 4", "int8, --recompute",
    ]  # fmt: skip


def test_the_allowance_is_the_sum_of_parameters_state_stash_and_one_wire(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "HEAD", 1)
    model = import_module("transformers").build_transformer(width=8, length=4, layers=2)
    prepared = benchmark.prepare(benchmark.open_model(model))
    bundle = benchmark.make_bundle(prepared, benchmark.Setting())
    weights = 3 * 8 * 8 + 8 + 8 + 2 * (8 * 32) + 32 + 1  # and one fixed scale
    memory = benchmark.measure_bundle(bundle, 5)[0]
    assert memory.gradients <= 4 * weights
    found = benchmark.count_allowance(bundle, 5)
    wire = 4 * 5 * 4 * 8
    assert found == memory.parameters + memory.optimizer + memory.stash + wire


@linux_only
def test_a_client_that_is_recorded_is_played_back_and_measured(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(benchmark, "HEAD", 1)
    monkeypatch.setattr(benchmark, "BATCH", 4)
    model = import_module("transformers").build_transformer(width=8, length=4, layers=2)
    prepared = benchmark.prepare(benchmark.open_model(model))
    setting = benchmark.Setting(wire="int8", accumulate=2)
    bundle = benchmark.make_bundle(prepared, setting)
    found = list(benchmark.measure(bundle, tmp_path / "bundle", setting, rounds=2, steps=1))
    assert len(found) == 2
    for one in found:
        assert one["own"] > 0
        assert 1e7 < one["base"] <= one["peak"] < 1e9


@linux_only
def test_no_step_needs_much_more_memory_than_the_first(
    benchmark: ModuleType, tmp_path: Any
) -> None:
    """With memory patterns, the second took half as much again."""
    from splitonnx.partitioner.partitions import cut

    model = import_module("resnets").build_resnet18(16)
    cut(model, at=None, check=False).client.save(tmp_path / "client")
    done = subprocess.run(
        [sys.executable, "-c", SECOND_STEP, tmp_path / "client"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    first, *_, last = map(int, done.stdout.split())
    assert last - first < 0.1 * first
