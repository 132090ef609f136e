"""The gradients of activations against the fused kernels."""

from __future__ import annotations

import pytest

from tests.partitioner.lowerings.fused_kernels import SHAPE, compare
from tests.support.zoo import Net


@pytest.mark.parametrize("kind", ["Relu", "Sigmoid", "Tanh", "Gelu", "LeakyRelu", "Sin", "Erf"])
def test_activations(kind: str) -> None:
    net = Net(opset=20 if kind == "Gelu" else 18)
    net.op(kind, "x", out="y")
    compare(net, "y", SHAPE)


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_softmax(kind: str, axis: int) -> None:
    net = Net()
    net.op(kind, "x", out="y", axis=axis)
    assert compare(net, "y", SHAPE) >= {f"{kind}Grad_13"}
