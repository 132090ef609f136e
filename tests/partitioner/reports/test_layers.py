"""Weights by layer: grouped by their names, or by the node that uses them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from splitonnx.manifests import Role
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
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


def build_branches(names: tuple[str, str], *, is_constant: bool = False) -> onnx.ModelProto:
    """Build a model whose If has equal weights with these names in its branches."""
    net = Net()
    net.op("MatMul", "x", net.weight("w0", 4, 4), out="h")
    net.op("ReduceMax", "h", out="top", keepdims=0)
    net.op("Greater", "top", net.constant("none", np.array(1, np.float32)), out="hot")
    array = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)

    def branch(place: str, name: str) -> onnx.GraphProto:
        stored = onnx.numpy_helper.from_array(array, name)
        product = helper.make_node("MatMul", ["h", name], [f"{place}.out"], f"{place}.product")
        constant = helper.make_node("Constant", [], [name], f"{place}.{name}", value=stored)
        nodes = [constant, product] if is_constant else [product]
        result = helper.make_tensor_value_info(f"{place}.out", onnx.TensorProto.FLOAT, None)
        return helper.make_graph(nodes, place, [], [result], [] if is_constant else [stored])

    then, other = branch("then", names[0]), branch("else", names[1])
    net.nodes.append(
        helper.make_node("If", ["hot"], ["r"], "choice", then_branch=then, else_branch=other)
    )
    net.op("MatMul", "r", net.weight("w1", 4, 2), out="y")
    return net.finish({"x": (FLOAT, ["N", 4])}, "y", 2)


@pytest.mark.parametrize(
    ("names", "is_constant", "expected"),
    [
        (("a", "b"), False, {"a", "b"}),
        (("a", "a"), False, {"a", "choice/a"}),
        (("a", "b"), True, {"a", "b"}),
        (("a", "a"), True, {"choice/a", "choice/a_2"}),
    ],
)
def test_weights_in_branches_are_layers_named_after_the_nodes_that_use_them(
    names: tuple[str, str], is_constant: bool, expected: set[str]
) -> None:
    model = build_branches(names, is_constant=is_constant)
    layers = check(model, loss="mse").layers
    assert layers[0].weights[0].name == "w0"
    assert {layer.name for layer in layers[1:3]} == {"then.product", "else.product"}
    assert {weight.name for layer in layers[1:3] for weight in layer.weights} == expected
    bundle = cut(model, at=None, loss="mse", check=True)
    assert expected <= set(bundle.client.weights)
