"""Numbers in a model that ask for tables without end: refused in a sentence before one is made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from tests.support.zoo import FLOAT, Net

HUGE = 10**9


def finish(net: Net, output: str) -> onnx.ModelProto:
    return net.finish({"x": (FLOAT, ["N", 1, 8, 8])}, output, "C", "H", "W")


def start() -> tuple[Net, str]:
    net = Net()
    kernel = net.weight("w", 1, 1, 3, 3)
    return net, net.op("Conv", "x", kernel, out="first", pads=[1, 1, 1, 1])


def build_pool(kind: str) -> onnx.ModelProto:
    net, value = start()
    sizes = {"kernel_shape": [30_000, 30_000], "pads": [29_999] * 4}
    return finish(net, net.op(kind, value, out="output", **sizes))


def build_resize() -> onnx.ModelProto:
    """Each axis alone is within the bound, both are not."""
    net, value = start()
    scales = net.constant("scales", np.array([1, 1, 1e6, 1e6], np.float32))
    return finish(net, net.op("Resize", value, "", scales, out="output", mode="cubic"))


def build_transform() -> onnx.ModelProto:
    net, value = start()
    length = net.constant("length", np.array(HUGE))
    value = net.op("DFT", value, length, out="transformed", axis=2)
    return finish(net, value)


def build_added(write: Callable[[Net], str]) -> onnx.ModelProto:
    net, value = start()
    total = net.op("ReduceSum", write(net), out="total")
    return finish(net, net.op("Add", value, total, out="output"))


def write_diagonal(net: Net) -> str:
    zeros = net.op("ConstantOfShape", net.constant("sizes", np.array([20_000] * 2)), out="zeros")
    return net.op("EyeLike", zeros, out="table", dtype=1)


def write_range(net: Net) -> str:
    ends = [net.constant(f"end{i}", np.array(n, np.int64)) for i, n in enumerate((0, HUGE, 1))]
    return net.op("Cast", net.op("Range", *ends, out="places"), out="table", to=1)


def write_tiles(net: Net) -> str:
    row = net.op("ConstantOfShape", net.constant("sizes", np.array([1, 8])), out="row")
    return net.op("Tile", row, net.constant("times", np.array([HUGE // 10, 1])), out="table")


def write_expanded(net: Net) -> str:
    row = net.op("ConstantOfShape", net.constant("sizes", np.array([1, 8])), out="row")
    return net.op("Expand", row, net.constant("all", np.array([HUGE // 10, 8])), out="table")


def build_neighbours() -> onnx.ModelProto:
    net, value = start()
    return finish(net, net.op("LRN", value, out="output", size=HUGE + 1))


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "AveragePool": lambda: build_pool("AveragePool"),
    "LpPool": lambda: build_pool("LpPool"),
    "LRN": build_neighbours,
    "Resize": build_resize,
    "DFT": build_transform,
    "EyeLike": lambda: build_added(write_diagonal),
    "Range": lambda: build_added(write_range),
    "Tile": lambda: build_added(write_tiles),
    "Expand": lambda: build_added(write_expanded),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_table_without_end_is_refused_before_it_is_made(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="ask for tables of") as raised:
        cut(
            MODELS[name](),
            at="first",
            loss="mse",
            client_target="portable",
            server_target="portable",
        )
    assert "at most 67108864 are written for a model" in str(raised.value)


@pytest.mark.parametrize("name", ["AveragePool", "Resize", "EyeLike"])
def test_check_says_that_a_table_would_be_without_end(name: str) -> None:
    try:
        said = " ".join(check(MODELS[name](), loss="mse").obstacles)
    except UnsupportedModel as error:
        said = str(error)
    assert "ask for tables of" in said


def test_models_do_not_count_towards_one_another() -> None:
    net, value = start()
    scales = net.constant("scales", np.array([1, 1, 200, 200], np.float32))
    model = finish(net, net.op("Resize", value, "", scales, out="output", mode="cubic"))
    for _ in range(3):
        assert cut(model, at="first", loss="mse", server_target="portable").server is not None
