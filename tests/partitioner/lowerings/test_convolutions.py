"""The gradient of convolutions against the fused kernel, over the operator's attributes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from splitonnx.partitioner.differentiation.gradients import differentiate
from splitonnx.partitioner.lowerings import lower
from tests.partitioner.lowerings.fused_kernels import SHAPE, compare, run
from tests.support.zoo import FLOAT, Net


@pytest.mark.parametrize(
    ("weight", "attributes"),
    [
        ((5, 4, 3, 3), {}),
        ((5, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((5, 4, 3, 3), {"pads": [2, 0, 1, 2]}),
        ((5, 4, 3, 3), {"strides": [2, 2]}),
        ((5, 4, 3, 3), {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
        ((5, 4, 2, 2), {"strides": [3, 3]}),
        ((5, 4, 2, 2), {"dilations": [2, 3]}),
        ((5, 4, 3, 2), {"dilations": [2, 1], "strides": [2, 1], "pads": [1, 0, 2, 1]}),
        ((6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
        ((6, 2, 3, 3), {"group": 2, "strides": [2, 2]}),
        ((4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
        ((8, 1, 3, 3), {"group": 4, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((5, 4, 1, 1), {}),
        ((5, 4, 1, 1), {"strides": [2, 2]}),
        ((5, 4, 1, 1), {"pads": [1, 1, 1, 1]}),
    ],
)
def test_convolution(weight: tuple[int, ...], attributes: dict[str, object]) -> None:
    net = Net()
    net.op("Conv", "x", net.weight("w", *weight), net.weight("b", weight[0]), out="y", **attributes)
    assert compare(net, "y", SHAPE) >= {"ConvGrad"}


@pytest.mark.parametrize(
    ("weight", "attributes"),
    [
        ((5, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((2, 4, 3, 3), {"pads": [1, 0, 2, 1], "strides": [1, 2], "dilations": [2, 1]}),
        ((5, 4, 1, 1), {}),
        ((3, 4, 1, 1), {}),
        ((4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
        ((4, 1, 3, 2), {"group": 4, "pads": [2, 0, 1, 1], "dilations": [2, 1]}),
        ((4, 1, 3, 3), {"group": 4, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((4, 1, 3, 3), {"group": 4, "strides": [3, 2], "dilations": [1, 2]}),
    ],
)
def test_convolution_of_large_images(
    weight: tuple[int, ...], attributes: dict[str, object]
) -> None:
    net = Net()
    net.op("Conv", "x", net.weight("w", *weight), net.weight("b", weight[0]), out="y", **attributes)
    assert compare(net, "y", (2, 4, 37, 66)) >= {"ConvGrad"}


@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 3, 4, 5, 4)])
def test_convolution_in_one_and_three_dimensions(shape: tuple[int, ...]) -> None:
    rank = len(shape) - 2
    for strides in (1, 2):
        net = Net()
        weight = net.weight("w", 2, shape[1], *[3] * rank)
        net.op("Conv", "x", weight, out="y", strides=[strides] * rank, pads=[1] * (2 * rank))
        compare(net, "y", shape)


def test_convolution_of_images_of_any_size() -> None:
    net = Net()
    net.op("Conv", "x", net.weight("w", 5, 4, 3, 3), out="y", strides=[2, 2], pads=[1, 1, 1, 1])
    squared = net.op("Mul", "y", "y", out="squared")
    net.op("ReduceMean", squared, out="loss", keepdims=0)
    weight = onnx.numpy_helper.to_array(net.weights[0])
    graph = helper.make_graph(
        net.nodes,
        "case",
        [
            helper.make_tensor_value_info("x", FLOAT, ["N", 4, "H", "W"]),
            helper.make_tensor_value_info("w", FLOAT, weight.shape),
        ],
        [helper.make_tensor_value_info("loss", FLOAT, [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    joint = differentiate(
        ir.from_proto(onnx.shape_inference.infer_shapes(model)), ["x", "w"], "loss"
    )
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    fused = run(joint, {"x": x, "w": weight})
    lower(joint.graph)
    for name, lowered in run(joint, {"x": x, "w": weight}).items():
        np.testing.assert_allclose(lowered, fused[name], rtol=1e-4, atol=1e-6)
