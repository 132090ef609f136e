"""Weights by layer: grouped by their names, or by the node that uses them."""

from __future__ import annotations

import numpy as np

from splitonnx.manifests import Role
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.reports.layers import list_layers
from tests.support.nets import FLOAT, Net


def test_weights_are_grouped_by_name_and_ordered_by_use() -> None:
    net = Net()
    value = net.op("Gemm", "x", net.weight("net.0.weight", 4, 6), net.weight("net.0.bias", 6),
                   out="g")  # fmt: skip
    value = net.batchnorm(value, 6, out="n", training=True)
    value = net.op("MatMul", value, net.weight("onnx::MatMul_7", 6, 5), out="m")
    name = net.constant("seq/head/MatMul/ReadVariableOp:0", np.ones((5, 3), np.float32) * 0.3)
    value = net.op("MatMul", value, name, out="y")
    prepared = prepare(open_model(net.finish({"x": (FLOAT, ["N", 4])}, value, 3)))
    layers = list_layers(prepared, {"net.0.bias": "it is odd"}, prepared.roles)
    assert [layer.name for layer in layers] == ["net.0", "n.bn", "m_node", "seq/head"]
    assert [layer.operators for layer in layers] == [
        ("Gemm",), ("BatchNormalization",), ("MatMul",), ("MatMul",)
    ]  # fmt: skip
    first, norm = layers[:2]
    assert [weight.doubt for weight in first.weights] == [None, "it is odd"]
    assert first.count(Role.PARAMETER) == 4 * 6 + 6
    assert (norm.count(Role.PARAMETER), norm.count(Role.BUFFER)) == (12, 12)
    assert {weight.name for layer in layers for weight in layer.weights} == set(prepared.roles)


def test_a_weight_behind_a_transpose_belongs_to_the_node_that_uses_it() -> None:
    net = Net()
    turned = net.op("Transpose", net.weight("w", 3, 4), out="t", perm=[1, 0])
    model = net.finish({"x": (FLOAT, ["N", 4])}, net.op("MatMul", "x", turned, out="y"), 3)
    prepared = prepare(open_model(model))
    (layer,) = list_layers(prepared, {}, {"w": Role.FROZEN})
    assert (layer.name, layer.operators) == ("y_node", ("MatMul",))
    assert (layer.count(Role.PARAMETER), layer.count(Role.FROZEN)) == (0, 12)
