"""What a step costs the device, a benchmark: its arithmetic, its cores, its clients on a small net.

The networks that it is for take minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from splitonnx import cut
from tests.conftest import ROOT

pytestmark = pytest.mark.alone

TURN = {"own": 0.032, "awake": 0.048, "peak": 160e6, "wire": 1.6e6}

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark is for Linux")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("device_cost")


def make_networks(benchmark: ModuleType, walls: Mapping[int, float]) -> dict[int, Any]:
    """What the benchmark knows of the networks whose steps take so many seconds."""
    return {
        depth: benchmark.Network(
            folder=Path("client"), parameters=depth * 1_000_000, wall=wall, replies=[]
        )
        for depth, wall in walls.items()
    }


def scale(factor: float, *names: str) -> dict[str, float]:
    return {name: value * (factor if name in names else 1) for name, value in TURN.items()}


def build_small(side: int) -> onnx.ModelProto:
    """A network with the benchmark's data: the stem, a mean of each channel, a classifier."""
    random = np.random.default_rng(0)
    weights = {"w": (4, 3, 3, 3), "v": (4, 10)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["stem"], strides=[4, 4], pads=[1] * 4, name="stem"),
        helper.make_node("GlobalAveragePool", ["stem"], ["mean"], name="mean"),
        helper.make_node("Flatten", ["mean"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "v"], ["logits"], name="logits"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [
            numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    ("cores", "clients", "servers"),
    [({0, 1}, {1}, {0}), ({2, 0, 7, 5}, {7}, {0, 2, 5}), ({3}, {3}, {3})],
)
def test_clients_have_a_core_of_their_own_where_there_are_two(
    benchmark: ModuleType, cores: set[int], clients: set[int], servers: set[int]
) -> None:
    assert benchmark.divide_cores(cores) == (clients, servers)


@linux_only
def test_a_process_runs_on_the_cores_that_it_was_started_on(benchmark: ModuleType) -> None:
    mine = os.sched_getaffinity(0)
    for cores in benchmark.divide_cores(mine):
        with benchmark.on_cores(cores):
            process = subprocess.Popen(
                [sys.executable, "-c", "import os; input(); print(os.sched_getaffinity(0))"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert os.sched_getaffinity(0) == mine
        assert process.communicate("\n")[0].strip() == str(cores)


def test_ratios_are_to_the_same_turn_s_smallest_network(benchmark: ModuleType) -> None:
    """A machine that slows down fourfold changes the figures, and no ratio."""
    turns = [
        {18: scale(drift, "own", "awake"), 152: scale(1.05 * drift, "own", "awake")}
        for drift in (1, 2, 4)
    ]
    small, large = benchmark.summarise(make_networks(benchmark, {152: 2.0, 18: 0.5}), turns)
    assert (small.depth, small.parameters, small.wall) == (18, 18_000_000, 0.5)
    assert (large.depth, large.parameters, large.wall) == (152, 152_000_000, 2.0)
    assert small.figures["own"] == pytest.approx(2 * TURN["own"] / benchmark.BATCH)
    assert set(small.ratios.values()) == {1}
    assert (large.ratios["own"], large.ratios["awake"]) == pytest.approx((1.05, 1.05))
    assert large.ratios["peak"] == 1


@pytest.mark.parametrize("name", ["own", "awake", "peak"])
@pytest.mark.parametrize(
    ("factor", "is_constant"), [(1.09, True), (1.11, False), (0.91, True), (0.89, False)]
)
def test_each_figure_of_the_client_may_differ_by_a_tenth(
    benchmark: ModuleType, name: str, factor: float, is_constant: bool
) -> None:
    networks = make_networks(benchmark, {18: 0.5, 152: 4.5})
    _, large = benchmark.summarise(networks, [{18: TURN, 152: scale(factor, name)}])
    assert large.is_constant(benchmark.DECIDING) == is_constant
    assert large.is_constant(set(benchmark.DECIDING) - {name})


def test_the_table_and_the_plot_show_every_network(benchmark: ModuleType) -> None:
    networks = make_networks(benchmark, {18: 0.5, 152: 2.0})
    costs = benchmark.summarise(networks, [{18: TURN, 152: TURN}])
    console = Console(width=160)
    with console.capture() as capture:
        console.print(benchmark.tabulate(costs))
    row = next(line for line in capture.get().splitlines() if "ResNet-152" in line)
    assert re.findall(r"[\d.]+ \w+", row) == [
        "152.0 M", "2000 ms", "2.000 ms", "3.000 ms", "160.0 MB", "100.0 kB",
    ]  # fmt: skip
    tree = ElementTree.fromstring(benchmark.draw(costs))
    texts = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    counts = [texts.count(text) for text in ("18", "152", "2.00", "3.00", "160", "18.0", "152.0")]
    assert counts == [5, 5, 3, 2, 2, 1, 1]  # each step of the larger network takes 2.00 s as well
    bars = tree.findall("{http://www.w3.org/2000/svg}rect[@x]")
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert len(heights) % 2 == 0
    assert heights[0] == heights[1]
    assert heights[-1] == pytest.approx(4 * heights[-2])


@linux_only
def test_clients_measure_their_steps_in_turn_on_what_a_server_once_said(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    bundle = cut(build_small(benchmark.SIDE), at="stem", tail_at="logits", send_labels=True)
    bundle.save(tmp_path / "bundle")
    client = tmp_path / "bundle/client"
    with (
        benchmark.serve(tmp_path / "bundle/server", threads=1) as served,
        benchmark.recording(served) as (url, replies),
        benchmark.ClientProcess("python", client, url) as first,
    ):
        for _ in range(benchmark.WARM_UP + 2):
            first.step()
        first.finish()
    assert len(replies) == 1 + 2 * (benchmark.WARM_UP + 2)  # a greeting, and two a step
    with (
        benchmark.playing(replies) as url,
        benchmark.ClientProcess("python", client, url) as one,
        benchmark.ClientProcess("python", client, url) as other,
    ):
        turns = benchmark.train_round({18: one, 34: other}, steps=2)
    assert [list(turn) for turn in turns] == [[18, 34], [34, 18]]
    images = benchmark.BATCH * 4 * (benchmark.SIDE // 4) ** 2 * 4  # both ways, in bytes
    for cost in (cost for turn in turns for cost in turn.values()):
        assert {*benchmark.SHOWN, "wall"} == set(cost)
        assert 0 < cost["awake"] < cost["wall"]
        assert cost["own"] > 0
        assert cost["peak"] > 1e7
        assert 2 * images < cost["wire"] < 2 * images + 10_000


@linux_only
def test_a_client_that_ends_is_noticed(benchmark: ModuleType, tmp_path: Path) -> None:
    with (
        benchmark.ClientProcess("python", tmp_path / "missing", "ws://127.0.0.1:1") as client,
        pytest.raises((EOFError, BrokenPipeError)),
    ):
        client.step()
