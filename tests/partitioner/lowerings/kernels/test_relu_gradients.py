"""The gradient of Relu as a product has the bits of a selection."""

from __future__ import annotations

import numpy as np
import pytest

from tests.partitioner.lowerings.kernels.chosen import build, choose, run


def test_the_gradient_of_relu_has_the_bits_of_a_selection() -> None:
    random = np.random.default_rng(0)
    y = random.standard_normal((3, 4, 5, 6)).astype(np.float32)
    y.flat[:9] = [0.0, -0.0, 1e-30, -1e-30, 2e38, -2e38, 1.2e-38, np.inf, 1.0]
    dy = random.standard_normal(y.shape).astype(np.float32)
    model = build("ReluGrad", {"dy": dy, "y": y}, ["dx"], domain="com.microsoft")
    assert choose(model) == ["HardSigmoid", "Mul"]
    expected = np.where(y > 0, dy, np.float32(0))
    np.testing.assert_array_equal(run(model, {"dy": dy, "y": y})["dx"], expected)


def test_where_the_output_is_denormal_the_gradient_is_between_0_and_that_of_a_positive_one() -> (
    None
):
    y = np.array([1e-40, -1e-40], np.float32)
    dy = np.ones(2, np.float32)
    model = build("ReluGrad", {"dy": dy, "y": y}, ["dx"], domain="com.microsoft")
    choose(model)
    positive, negative = run(model, {"dy": dy, "y": y})["dx"]
    assert 0 <= positive <= 1
    assert negative == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_keep_the_operator_for_which_they_have_a_kernel(dtype: type) -> None:
    y: np.ndarray = np.ones((2, 3), dtype)
    assert choose(build("ReluGrad", {"dy": y, "y": y}, ["dx"], domain="com.microsoft")) == [
        "ReluGrad"
    ]
