"""Weights that the graph computes first, and that only scale the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

import splitonnx
from splitonnx.errors import InputsNotPermitted
from splitonnx.names import TRAIN
from tests.support.nets import FLOAT, Net


def normalize(net: Net, weight: str) -> str:
    axes = net.constant("axes", np.array([1, 2, 3]))
    return net.op("Div", weight, net.op("ReduceL2", weight, axes, out="norm"), out="c")


COMPUTED: dict[str, Callable[[Net, str], str]] = {
    "normalized": normalize,
    "clipped": lambda net, weight: net.op(
        "Clip", weight, net.constant("low", np.array(-1, np.float32)), out="c"
    ),
    "reshaped": lambda net, weight: net.op(
        "Reshape", weight, net.constant("to", np.array([3, -1, 1, 1])), out="c"
    ),
    "scaled": lambda net, weight: net.op("Mul", weight, net.weight("g", 3, 1, 1, 1), out="c"),
    "rounded": lambda net, weight: net.op(
        "DequantizeLinear",
        net.op("QuantizeLinear", weight, "step", out="i"),
        net.constant("step", np.array(0.01, np.float32)),
        out="c",
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_first_is_judged_by_its_value(name: str) -> None:
    def build(group: int) -> onnx.ModelProto:
        net = Net()
        kernel = COMPUTED[name](net, net.weight("k0", 3, 3 // group, 1, 1))
        scaled = net.op("Conv", "x", kernel, out="q", group=group)
        flat = net.op("Flatten", net.op("Relu", scaled, out="r"), out="flat")
        output = net.op("MatMul", flat, net.weight("last", 48, 3), out="scores")
        return net.finish({"x": (FLOAT, ["N", 3, 4, 4])}, output, 3)

    options: dict[str, Any] = {"at": "q", "send_labels": True, "check": False}
    with pytest.raises(InputsNotPermitted, match=r"'q', computed .* raw input 'x'"):
        splitonnx.cut(build(3), **options)
    (listed,) = (one for one in splitonnx.inspect(build(3)) if one.tensor == "q")
    assert listed.raw == ("x",)
    permitted = splitonnx.cut(build(3), send_inputs=["x"], **options)
    phases = splitonnx.explain(permitted.client).phases
    (phase,) = (own for own in phases if own.leaves.phase == TRAIN)
    (way,) = next(own for own in phase.arrays if own.name == "x").ways
    (layer,) = way.dependence.layers
    assert layer.is_computed
    assert str(layer).endswith("; computed first, not examined)")
    splitonnx.cut(build(1), **options)  # a full kernel mixes channels
