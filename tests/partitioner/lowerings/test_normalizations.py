"""The gradients of normalizations against the fused kernels."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from tests.partitioner.lowerings.fused_kernels import SHAPE, compare
from tests.support.zoo import Net


@pytest.mark.parametrize("shape", [(5, 3), (3, 4, 6), SHAPE])
def test_batch_normalization(shape: tuple[int, ...]) -> None:
    net = Net()
    net.batchnorm("x", shape[1], out="y", training=True)
    found = compare(net, "y", shape)
    assert found >= {"BatchNormInternal", "BatchNormalizationGrad"}


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_layer_normalization(axis: int) -> None:
    net = Net()
    shape = SHAPE[axis:]
    weights = [net.constant(n, np.full(shape, v, np.float32)) for n, v in (("s", 1.2), ("b", 0.3))]
    net.nodes.append(
        helper.make_node("LayerNormalization", ["x", *weights], ["y", "mean", "inv"], axis=axis)
    )
    assert compare(net, "y", SHAPE) >= {"LayerNormalizationGrad"}
