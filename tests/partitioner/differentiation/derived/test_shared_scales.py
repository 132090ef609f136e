"""Normalizations that share a scale and a bias, trained or not."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.differentiation.derived.shared_scales import separate_scales
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import close_net, draw_labels, hold_steps
from tests.support.zoo import Net

WIDTH = 6
DATA = {"x": np.random.default_rng(0).standard_normal((3, WIDTH, WIDTH), np.float32)}
KINDS: Mapping[str, tuple[str, Mapping[str, int]]] = {
    "layer norm": ("LayerNormalization", {"axis": -1}),
    "instance norm": ("InstanceNormalization", {}),
}


def build(kind: str) -> onnx.ModelProto:
    """Three layers, each normalized with the same scale and the same bias."""
    net = Net()
    operator, attributes = KINDS[kind]
    scale, bias = net.weight("scale", WIDTH), net.weight("bias", WIDTH)
    value = "x"
    for index in range(3):
        value = net.op("MatMul", value, net.weight(f"w{index}", WIDTH, WIDTH), out=f"m{index}")
        value = net.op(operator, value, scale, bias, out=f"n{index}", **attributes)
    net.op("Identity", value, out="y")
    return close_net(net, DATA)


@pytest.mark.parametrize("freeze", [(), ("^scale$",), ("^scale$", "^bias$")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_what_is_trained_are_right(kind: str, freeze: tuple[str, ...]) -> None:
    model = build(kind)
    data = {**DATA, "labels": draw_labels(model, DATA)}
    prepared = prepare(open_model(model), freeze=freeze)
    bundles = [cut_prepared(prepared, at=None, loss="mse", client_target=t) for t in TARGETS]
    names = [tensor.name for tensor in model.graph.initializer]
    trained = [name for name in names if not any(re.search(p, name) for p in freeze)]
    hold_steps([run_step(b, data) for b in bundles], model, "mse", data, trained)


def test_only_normalizations_that_share_something_are_changed() -> None:
    model = ir.from_proto(build("layer norm"))
    assert separate_scales(model.graph)
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    read = [value for node in norms for value in node.inputs[1:]]
    assert len(set(read)) == len(read) == 6
    assert not separate_scales(model.graph)
