"""Tests of which states hold raw inputs of the steps before."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import pytest

from splitonnx.partitioner.partitions import cut
from tests.support.carried import (
    AVERAGES,
    BATCH,
    RECURRENT,
    Shapes,
    build_averages,
    build_delayed,
    build_recurrent,
    close,
)
from tests.support.nets import FLOAT, Net


def find_held(model: onnx.ModelProto, states: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    bundle = cut(model, at=None, loss="mse", dims={"N": BATCH}, states=states)
    return bundle.client.manifest.raw_states


def build_register(*, mixes: bool) -> onnx.ModelProto:
    """Carry an input over two steps; ``mixes`` puts a layer between the first and the second."""
    net = Net()
    read = net.op("MatMul", "x", net.weight("w", 3, 3), out="m")
    net.op("MatMul", net.op("Add", read, "r2", out="s"), net.weight("u", 3, 2), out="y")
    net.op("Neg", "x", out="n1")
    second = net.op("MatMul", "r1", net.weight("v", 3, 3), out="k") if mixes else "r1"
    net.op("Identity", second, out="n2")
    inputs: Shapes = {name: (FLOAT, ["N", 3]) for name in ("x", "r1", "r2")}
    outputs: Shapes = {"n1": (FLOAT, ["N", 3]), "n2": (FLOAT, ["N", 3])}
    return close(net, inputs, {"y": (FLOAT, ["N", 2]), **outputs})


def test_a_copy_of_an_input_is_raw_and_a_hidden_state_is_not() -> None:
    assert find_held(build_delayed(), {"after": "before"}) == {"before": ("x",)}
    assert find_held(build_recurrent(), RECURRENT) == {}
    assert find_held(build_averages(), AVERAGES) == {}


@pytest.mark.parametrize("mixes", [False, True])
def test_a_state_that_takes_over_another_holds_what_that_held(*, mixes: bool) -> None:
    held = find_held(build_register(mixes=mixes), {"n1": "r1", "n2": "r2"})
    assert held == {"r1": ("x",), **({} if mixes else {"r2": ("x",)})}
