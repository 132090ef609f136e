"""The gradients of pools against the fused kernels, over the operators' attributes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.partitioner.lowerings import lower
from tests.partitioner.lowerings.fused_kernels import SHAPE, compare, run
from tests.support.zoo import FLOAT, Net


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 3], "strides": [1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [2, 2], "dilations": [2, 2], "strides": [1, 1]},
    ],
)
def test_max_pool(attributes: dict[str, object]) -> None:
    net = Net()
    net.op("MaxPool", "x", out="y", **attributes)
    assert compare(net, "y", SHAPE) >= {"MaxPoolGrad"}


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 2], "strides": [1, 2]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        {"kernel_shape": [2, 2], "strides": [1, 1], "pads": [0, 1, 1, 0]},
    ],
)
def test_average_pool(attributes: dict[str, object]) -> None:
    net = Net()
    net.op("AveragePool", "x", out="y", **attributes)
    assert compare(net, "y", SHAPE, static=True) >= {"AveragePoolGrad"}


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    ],
)
def test_average_pools_gradient_is_the_adjoint_of_the_pool(attributes: dict[str, object]) -> None:
    """<pool(x), y> = <x, pool_grad(y)>: the pool is linear, so this holds its gradient to it."""
    random = np.random.default_rng(0)
    net = Net()
    net.op("AveragePool", "x", out="y", **attributes)
    model = net.finish({"x": (FLOAT, ["N", *SHAPE[1:]])}, "y", "C", "H", "W")
    x = random.standard_normal(SHAPE).astype(np.float32)
    (pooled,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    dy = random.standard_normal(pooled.shape).astype(np.float32)
    source = ir.Value(
        name="dy", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", *dy.shape[1:]])
    )
    node = ir.node("AveragePoolGrad", [source], attributes, name="grad")  # type: ignore[arg-type]
    node.outputs[0].name, node.outputs[0].type = "dx", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["N", *SHAPE[1:]])
    graph = ir.Graph([source], node.outputs, nodes=[node], opset_imports={"": 18}, name="grad")
    lower(graph)
    dx = run(ir.Model(graph, ir_version=9), {"dy": dy})["dx"]
    np.testing.assert_allclose(np.vdot(pooled, dy), np.vdot(x, dx), rtol=1e-4)
