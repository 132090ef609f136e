"""The gradients of what moves, stretches and multiplies elements against the fused kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from splitonnx.partitioner.lowerings import is_standard, lower
from tests.partitioner.lowerings.fused_kernels import SHAPE, compare, run
from tests.support.zoo import Net


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("indices", [[2, 0, 2, -1], [[1, 1], [0, 2]], 1])
def test_gather(axis: int, indices: object) -> None:
    net = Net()
    net.op("Gather", "x", net.constant("i", np.array(indices, np.int64)), out="y", axis=axis)
    assert compare(net, "y", (3, 4, 5)) >= {"GatherGrad"}


def test_gather_elements() -> None:
    net = Net()
    places = net.constant("i", np.random.default_rng(0).integers(0, 4, (3, 2, 5)))
    net.op("GatherElements", "x", places, out="y", axis=1)
    assert "GatherElementsGrad" in compare(net, "y", (3, 4, 5))


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [([1], [3], [1], [1]), ([0, -3], [9, -1], [2, 1], [2, 1]), ([-1], [-9], [1], [-2])],
)
def test_slice(starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> None:
    net = Net()
    settings = [
        net.constant(name, np.array(values, np.int64))
        for name, values in (("s", starts), ("e", ends), ("a", axes), ("t", steps))
    ]
    net.op("Slice", "x", *settings, out="y")
    assert compare(net, "y", SHAPE) >= {"SliceGrad"}


def test_split_and_concat() -> None:
    net = Net()
    sizes = net.constant("sizes", np.array([1, 3], np.int64))
    net.nodes.append(helper.make_node("Split", ["x", sizes], ["a", "b"], axis=1))
    net.op("Concat", "b", "x", "a", out="y", axis=1)
    assert compare(net, "y", SHAPE) >= {"ConcatTraining"}


@pytest.mark.parametrize("shape", [(7, 6), (4, 1, 1), (1, 4, 7, 6), (1,)])
@pytest.mark.parametrize("kind", ["Add", "Mul", "Div", "Sub", "Max"])
def test_broadcasting(kind: str, shape: tuple[int, ...]) -> None:
    net = Net()
    positive = net.constant("w", np.abs(np.random.default_rng(1).normal(2, 0.2, shape)).astype("f"))
    base = net.op("Exp", "x", out="base")
    net.op(kind, base, positive, out="y")
    compare(net, "y", SHAPE)


def test_matrix_products_with_transposes() -> None:
    net = Net()
    turned = net.op("Transpose", "x", out="turned", perm=[0, 1, 3, 2])
    product = net.op("MatMul", turned, "x", out="product_xx")
    net.op("MatMul", product, net.weight("w", 6, 5), out="y")
    assert "FusedMatMul" in compare(net, "y", SHAPE)


@pytest.mark.parametrize("down", [0, 1])
def test_scaling_up_and_down(down: int) -> None:
    """Against the training runtime's own kernel, and numpy."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=kind, shape=ir.Shape(["N", 3]))
    scale = ir.Value(name="scale", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    node = ir.node("Scale", [x, scale], {"scale_down": down}, domain="com.microsoft", name="s")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", kind, x.shape
    graph = ir.Graph([x, scale], node.outputs, nodes=[node],
                     opset_imports={"": 18, "com.microsoft": 1}, name="g")  # fmt: skip
    feeds = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "scale": np.array(4)}
    model = ir.Model(graph, ir_version=9)
    fused = run(model, feeds)["y"]
    lower(graph)
    assert all(is_standard(left, 18) for left in graph)
    np.testing.assert_array_equal(run(model, feeds)["y"], fused)
    np.testing.assert_array_equal(fused, feeds["x"] / 4 if down else feeds["x"] * 4)
