"""Fused products and convolutions, against ONNX Runtime's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from splitonnx.errors import UnsupportedModel
from tests.support.fused_models import (
    build_fused,
    draw,
    hold_fused,
    optimize,
    run_stock,
    run_written,
    write_out,
)


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("right", [0, 1])
def test_operands_are_swapped_and_scaled(left: int, right: int) -> None:
    a, b = draw(2, 3, 4), draw(2, 4, 5)
    data = {"a": a.swapaxes(1, 2).copy() if left else a}
    weights = {"b": b.swapaxes(1, 2).copy() if right else b}
    model = build_fused(
        "FusedMatMul", ["a", "b"], data, weights, transA=left, transB=right, alpha=0.25
    )
    (found,) = hold_fused(model, data)
    np.testing.assert_allclose(found, 0.25 * a @ b, rtol=1e-4, atol=1e-5)


def test_a_moved_batch_is_refused() -> None:
    model = build_fused(
        "FusedMatMul", ["a", "b"], {"a": draw(2, 3, 4)}, {"b": draw(2, 4, 5)}, transBatchA=1
    )
    with pytest.raises(UnsupportedModel, match="moves the batch"):
        write_out(model)


def test_a_convolution_adds_its_fourth_input() -> None:
    data = {"x": draw(2, 3, 6, 6), "z": draw(2, 4, 6, 6)}
    weights = {"w": draw(4, 3, 3, 3), "b": draw(4)}
    model = build_fused(
        "FusedConv", ["x", "w", "b", "z"], data, weights, activation="Relu", pads=[1, 1, 1, 1]
    )
    hold_fused(model, data)


ACTIVATIONS: list[dict[str, Any]] = [
    {"activation": "Relu"},
    {"activation": "Sigmoid"},
    {"activation": "Tanh"},
    {"activation": "Softplus"},
    {"activation": "Softsign"},
    {"activation": "LeakyRelu", "activation_alpha": 0.2, "transB": 1},
    {"activation": "Elu", "activation_alpha": 0.7},
    {"activation": "Celu", "activation_alpha": 0.7},
    {"activation": "ThresholdedRelu", "activation_alpha": 0.4},
    {"activation": "HardSigmoid", "activation_alpha": 0.3, "activation_beta": 0.4},
    {"activation": "Selu", "activation_alpha": 1.5, "activation_gamma": 1.1},
]


@pytest.mark.parametrize("given", ACTIVATIONS, ids=lambda given: str(given["activation"]))
def test_a_product_is_activated(given: dict[str, Any]) -> None:
    data, b = {"a": draw(3, 4)}, draw(4, 5)
    weights = {"b": b.T.copy() if "transB" in given else b, "c": draw(5)}
    hold_fused(build_fused("FusedGemm", ["a", "b", "c"], data, weights, **given), data)


@pytest.mark.parametrize("kind", [g["activation"] for g in ACTIVATIONS if "Celu" not in g.values()])
def test_what_onnx_runtime_fuses_into_a_product_is_written_out(kind: str) -> None:
    """Its optimizer writes every attribute of the activation, also those that had defaults."""
    data = {"a": draw(3, 4)}
    nodes = [
        helper.make_node("Gemm", ["a", "b", "c"], ["h"]),
        helper.make_node(kind, ["h"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "activated",
        [helper.make_tensor_value_info("a", 1, ["N", 4])],
        [helper.make_tensor_value_info("y", 1, ["N", 5])],
        [numpy_helper.from_array(draw(4, 5), "b"), numpy_helper.from_array(draw(5), "c")],
    )
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    fused = optimize(plain)
    assert [node.op_type for node in fused.graph.node] == ["FusedGemm"]
    (expected,), (found,) = run_stock(plain, data), run_written(fused, data)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"activation": "Elu"}, "'Elu' has no attribute 'activation_alpha'"),
        (
            {"activation": "HardSigmoid", "activation_alpha": 0.2},
            "'HardSigmoid' has no attribute 'activation_beta'",
        ),
        ({"activation": "Mish"}, "'Mish' cannot be written out"),
    ],
)
def test_an_activation_that_onnx_runtime_does_not_load_is_refused(
    given: dict[str, Any], reason: str
) -> None:
    data, weights = {"a": draw(3, 4)}, {"b": draw(4, 5)}
    model = build_fused("FusedGemm", ["a", "b"], data, weights, **given)
    with pytest.raises(Exception, match="fused_gemm"):
        run_stock(model, data)
    with pytest.raises(UnsupportedModel, match=reason):
        write_out(model)
