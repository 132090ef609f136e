"""The gradient of a convolution's input, apart from the others, against sums in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.partitioner.lowerings.kernels.chosen import build, choose, run

NAMES = ("dx", "dw", "db")
SIZE = (7, 6)


def differentiate(
    dy: np.ndarray, x: np.ndarray, w: np.ndarray, *, pads: list[int], dilations: list[int],
    group: int, strides: list[int],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return the gradients of a convolution, as sums over the output and the kernel."""
    dy, x, w = (array.astype(np.float64) for array in (dy, x, w))
    top, left, bottom, right = pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    dx, dw = np.zeros_like(padded), np.zeros_like(w)
    outputs, inputs = w.shape[0] // group, w.shape[1]
    for m, i, j in itertools.product(range(w.shape[0]), range(dy.shape[2]), range(dy.shape[3])):
        first = (m // outputs) * inputs
        for c, a, b in itertools.product(range(inputs), range(w.shape[2]), range(w.shape[3])):
            row, column = i * strides[0] + a * dilations[0], j * strides[1] + b * dilations[1]
            dx[:, first + c, row, column] += dy[:, m, i, j] * w[m, c, a, b]
            dw[m, c, a, b] += (dy[:, m, i, j] * padded[:, first + c, row, column]).sum()
    height, width = x.shape[2:]
    cropped = dx[:, :, top : top + height, left : left + width]
    return {"dx": cropped, "dw": dw, "db": dy.sum((0, 2, 3))}


def make_case(
    weight: tuple[int, ...], pads: list[int], dilations: list[int], group: int, strides: list[int]
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    random = np.random.default_rng(0)
    w = random.standard_normal(weight).astype(np.float32)
    x = random.standard_normal((3, weight[1] * group, *SIZE)).astype(np.float32)
    sizes = [
        (SIZE[k] + pads[k] + pads[k + 2] - dilations[k] * (weight[2 + k] - 1) - 1) // strides[k] + 1
        for k in range(2)
    ]
    dy = random.standard_normal((3, weight[0], *sizes)).astype(np.float32)
    attributes: dict[str, object] = {
        "pads": pads, "dilations": dilations, "group": group, "strides": strides,
        "kernel_shape": list(weight[2:]),
    }  # fmt: skip
    return {"dy": dy, "x": x, "w": w}, attributes


@pytest.mark.parametrize(
    ("weight", "pads", "dilations", "group"),
    [
        ((5, 4, 3, 3), [1, 1, 1, 1], [1, 1], 1),
        ((5, 4, 3, 3), [0, 0, 0, 0], [1, 1], 1),
        ((5, 4, 3, 2), [2, 0, 1, 1], [1, 1], 1),
        ((5, 4, 3, 3), [2, 2, 2, 2], [2, 1], 1),
        ((6, 2, 3, 3), [1, 1, 1, 1], [1, 1], 2),
        ((4, 1, 3, 3), [1, 1, 1, 1], [1, 1], 4),
        ((4, 1, 3, 2), [0, 1, 2, 0], [1, 1], 4),
        ((4, 1, 2, 3), [1, 0, 0, 2], [1, 1], 4),
        ((4, 1, 1, 3), [0, 0, 0, 0], [1, 1], 4),
        ((8, 1, 3, 3), [1, 1, 1, 1], [1, 1], 4),
        ((5, 4, 1, 1), [0, 0, 0, 0], [1, 1], 1),
    ],
)
def test_a_convolution_computes_the_gradient_of_the_input(
    weight: tuple[int, ...], pads: list[int], dilations: list[int], group: int
) -> None:
    arrays, attributes = make_case(weight, pads, dilations, group, [1, 1])
    model = build("ConvGrad", arrays, NAMES, domain="com.microsoft", **attributes)
    kinds = choose(model)
    assert "Conv" in kinds
    assert ("ConvGrad" in kinds) == (group < weight[0] or group == 1)  # else of small images
    found = run(model, arrays)
    assert list(found) == list(NAMES)
    expected = differentiate(**arrays, pads=pads, dilations=dilations, group=group, strides=[1, 1])
    for name in NAMES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weight", "pads", "strides"),
    [((5, 4, 3, 3), [1, 1, 1, 1], [2, 2]), ((5, 4, 1, 1), [1, 1, 1, 1], [1, 1])],
    ids=["a stride", "more padding than the kernel reaches"],
)
def test_other_gradients_of_the_input_stay_with_the_others(
    weight: tuple[int, ...], pads: list[int], strides: list[int]
) -> None:
    arrays, attributes = make_case(weight, pads, [1, 1], 1, strides)
    model = build("ConvGrad", arrays, NAMES, domain="com.microsoft", **attributes)
    assert choose(model) == ["ConvGrad"]


def test_nothing_is_computed_for_an_input_without_a_gradient() -> None:
    arrays, attributes = make_case((5, 4, 3, 3), [1, 1, 1, 1], [1, 1], 1, [1, 1])
    model = build("ConvGrad", arrays, ["", "dw"], domain="com.microsoft", **attributes)
    assert choose(model) == ["ConvGrad"]
