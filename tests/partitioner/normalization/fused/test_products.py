"""Fused products and convolutions, against ONNX Runtime's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from splitonnx.errors import UnsupportedModel
from tests.support.fused_models import build_fused, draw, hold_fused, write_out


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


@pytest.mark.parametrize(
    "given",
    [{"activation": "Relu"}, {"activation": "LeakyRelu", "activation_alpha": 0.2, "transB": 1}],
)
def test_a_product_is_activated(given: dict[str, Any]) -> None:
    data, b = {"a": draw(3, 4)}, draw(4, 5)
    weights = {"b": b.T.copy() if "transB" in given else b, "c": draw(5)}
    hold_fused(build_fused("FusedGemm", ["a", "b", "c"], data, weights, **given), data)
