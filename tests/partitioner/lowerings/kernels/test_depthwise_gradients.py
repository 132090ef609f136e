"""The gradient of depthwise weights over stacked images: where it is chosen, and its values."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.partitioner.lowerings.kernels.depthwise_gradients import MOST_PIXELS
from tests.partitioner.lowerings.kernels.chosen import build, choose, run
from tests.partitioner.lowerings.kernels.test_convolution_gradients import differentiate, make_case

PADS = [1, 1, 1, 1]


@pytest.mark.parametrize("names", [("", "dw"), ("", "dw", "db")])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1], [2, 0, 1, 2], [0, 2, 2, 1]])
def test_weights_and_bias_have_the_sums_of_float64(pads: list[int], names: tuple[str, ...]) -> None:
    arrays, attributes = make_case((4, 1, 3, 3), pads, [1, 1], 4, [1, 1])
    model = build("ConvGrad", arrays, names, domain="com.microsoft", **attributes)
    assert "ConvGrad" not in choose(model)
    expected = differentiate(**arrays, pads=pads, dilations=[1, 1], group=4, strides=[1, 1])
    for name, found in run(model, arrays).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-4)


def test_images_do_not_reach_into_each_other() -> None:
    arrays, attributes = make_case((2, 1, 3, 3), [2, 2, 2, 2], [1, 1], 2, [1, 1])
    only = np.zeros_like(arrays["dy"])
    only[1] = arrays["dy"][1]
    arrays["dy"] = only
    model = build("ConvGrad", arrays, ("", "dw"), domain="com.microsoft", **attributes)
    choose(model)
    before = run(model, arrays)["dw"]
    others = arrays["x"].copy()
    others[[0, 2]] = 1e6
    np.testing.assert_array_equal(run(model, {**arrays, "x": others})["dw"], before)


@pytest.mark.parametrize(
    ("weight", "pads", "dilations", "group", "strides"),
    [
        ((4, 1, 3, 3), PADS, [1, 1], 4, [2, 2]),
        ((4, 1, 3, 3), PADS, [1, 2], 4, [1, 1]),
        ((8, 1, 3, 3), PADS, [1, 1], 4, [1, 1]),
        ((6, 2, 3, 3), PADS, [1, 1], 3, [1, 1]),
    ],
    ids=["strides", "dilations", "several outputs each", "several inputs each"],
)
def test_other_gradients_of_weights_stay(
    weight: tuple[int, ...], pads: list[int], dilations: list[int], group: int, strides: list[int]
) -> None:
    arrays, attributes = make_case(weight, pads, dilations, group, strides)
    model = build("ConvGrad", arrays, ("", "dw"), domain="com.microsoft", **attributes)
    assert choose(model) == ["ConvGrad"]


def test_large_images_stay() -> None:
    arrays, attributes = make_case((4, 1, 3, 3), PADS, [1, 1], 4, [1, 1])
    for name in ("dy", "x"):
        arrays[name] = np.zeros((1, 4, MOST_PIXELS, 2), np.float32)
    model = build("ConvGrad", arrays, ("", "dw"), domain="com.microsoft", **attributes)
    assert choose(model) == ["ConvGrad"]


def test_a_gradient_of_the_input_that_no_convolution_computes_keeps_the_others() -> None:
    arrays, attributes = make_case((4, 1, 1, 1), PADS, [1, 1], 4, [1, 1])
    model = build("ConvGrad", arrays, ("dx", "dw"), domain="com.microsoft", **attributes)
    assert choose(model) == ["ConvGrad"]
