"""Convolutions whose windows take their pixels from places that the graph computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.support.images import Case, hold, weights


@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)])
def test_a_convolution_of_moved_pixels(dynamic: Sequence[int]) -> None:
    random = np.random.default_rng(9)
    shift = random.integers(-2, 3, (2, 2 * 6 * 2, 3, 4)) + random.uniform(0.2, 0.8, (2, 24, 3, 4))
    others = {
        "w": weights(4, 2, 3, 2), "offset": shift.astype(np.float32), "b": weights(4),
        "mask": weights(2, 12, 3, 4),
    }  # fmt: skip
    attributes = {
        "group": 2, "offset_group": 2, "strides": [2, 1], "pads": [1, 0, 1, 1],
        "dilations": [1, 2], "kernel_shape": [3, 2],
    }  # fmt: skip
    case = Case(
        kind="DeformConv", x=(2, 4, 5, 5), others=others, trained=("x", *others),
        attributes=attributes, dynamic=dynamic,
    )  # fmt: skip
    hold(case, oracle="reference")  # ONNX Runtime 1.19.2 has no kernel for it
