"""Fused activations, against ONNX Runtime's kernels and their formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from splitonnx.errors import UnsupportedModel
from tests.support.fused_models import build_fused, draw, hold_fused, write_out

X, BIAS = draw(3, 4, 5), draw(5)
ERF = np.vectorize(math.erf)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("Gelu", ["x"]),
        ("BiasGelu", ["x", "bias"]),
        ("FastGelu", ["x"]),
        ("FastGelu", ["x", "bias"]),
        ("QuickGelu", ["x"]),
    ],
)
def test_each_is_its_formula(kind: str, inputs: list[str]) -> None:
    model = build_fused(kind, inputs, {"x": X}, {"bias": BIAS} if "bias" in inputs else {})
    (found,) = hold_fused(model, {"x": X})
    z = X + BIAS if "bias" in inputs else X
    factor = {
        "FastGelu": (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
        "QuickGelu": 1 / (1 + np.exp(-1.702 * z)),
    }.get(kind, (1 + ERF(z / math.sqrt(2))) / 2)
    np.testing.assert_allclose(found, z * factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("Relu", {}),
        ("Sigmoid", {}),
        ("Tanh", {}),
        ("LeakyRelu", {"activation_params": [0.3]}),
        ("Clip", {"activation_params": [-0.5, 0.75]}),
        ("HardSigmoid", {"activation_params": [0.3, 0.4]}),
    ],
)
def test_each_activation_of_a_convolution_is_applied(kind: str, given: dict[str, Any]) -> None:
    data = {"x": draw(2, 3, 6, 6)}
    weights = {"w": draw(4, 3, 3, 3), "b": draw(4)}
    model = build_fused("FusedConv", ["x", "w", "b"], data, weights, activation=kind, **given)
    hold_fused(model, data)


def test_an_unknown_activation_is_refused() -> None:
    weights = {"w": draw(4, 3, 3, 3)}
    model = build_fused(
        "FusedConv", ["x", "w"], {"x": draw(1, 3, 6, 6)}, weights, activation="Softsign"
    )
    with pytest.raises(UnsupportedModel, match=r"'fused' \(FusedConv\): its activation 'Softsign'"):
        write_out(model)
