"""Operators newer than opset 21 keep their meaning in operators of opset 21."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from splitonnx.partitioner.normalization.downgrades import DOWNGRADES
from tests.partitioner.normalization.opset_models import Writer, adapt, run
from tests.support.node_cases import list_node_cases

NEW = [
    "Attention", "CausalConvWithState", "CumProd", "LinearAttention", "RMSNormalization",
    "RotaryEmbedding", "SpaceToDepth", "SwiGLU", "Swish", "TensorScatter",
]  # fmt: skip


@pytest.mark.parametrize("operator", NEW)
def test_newer_operators_come_down_in_all_their_cases(operator: str) -> None:
    checked = 0
    for case in list_node_cases(operator):
        dtypes = {array.dtype.name for array in case.inputs.values()}
        if "bfloat16" in dtypes or "float64" in dtypes:  # ONNX Runtime has no such kernels
            continue
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        feeds = dict(case.inputs)
        if operator == "CumProd":
            axis = model.graph.input.pop()
            model.graph.initializer.append(numpy_helper.from_array(feeds.pop(axis.name), axis.name))
        found = run(adapt(model), feeds)
        tolerance = 2e-3 if "float16" in dtypes else 1e-4
        for array, (name, expected) in zip(found, case.outputs.items(), strict=True):
            np.testing.assert_allclose(
                array, expected, rtol=tolerance, atol=tolerance, err_msg=f"{case.name} {name}"
            )
        checked += 1
    assert checked or operator == "CumProd"


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dynamic", [False, True])
def test_running_products_along_axes_of_known_and_unknown_length(
    axis: int, reverse: int, exclusive: int, dynamic: bool
) -> None:
    net = Writer(26)
    place = net.constant("axis", np.array(axis))
    net.op("CumProd", "x", place, out="y", reverse=reverse, exclusive=exclusive)
    x = np.random.default_rng(0).uniform(-1.5, 1.5, (3, 4, 5)).astype(np.float32)
    x[1, 2, 3] = 0.0
    model = net.finish({"x": ["A", "B", "C"] if dynamic else x.shape}, "y", 3)
    turned = np.flip(x, axis) if reverse else x
    expected = np.cumprod(turned, axis)
    if exclusive:
        first = np.ones_like(np.take(expected, [0], axis))
        rest = np.take(expected, range(x.shape[axis] - 1), axis)
        expected = np.concatenate([first, rest], axis)
    expected = np.flip(expected, axis) if reverse else expected
    (found,) = run(adapt(model), {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_remainder_of_floats_has_the_sign_of_the_divisor() -> None:
    net = Writer(28)
    net.op("Mod", "x", net.constant("by", np.array([2.0, -2.0, 0.75], np.float32)), out="y")
    x = np.array([[5.5, 5.5, 1.0], [-5.5, -5.5, -1.0]], np.float32)
    (found,) = run(adapt(net.finish({"x": x.shape}, "y", 2)), {"x": x})
    np.testing.assert_allclose(found, np.mod(x, np.array([2.0, -2.0, 0.75])), rtol=1e-6)


def test_the_table_is_in_order() -> None:
    assert list(DOWNGRADES) == sorted(DOWNGRADES)
