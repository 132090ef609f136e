"""Windows over images: how they lie, what they sum, and padding that is found at run time."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.images import Case, hold, weights


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("x", [(1, 2, 7, 8), (1, 2, 6, 9)])
@pytest.mark.parametrize("kind", ["Conv", "MaxPool"])
def test_automatic_padding_of_any_image_size(kind: str, x: tuple[int, ...], mode: str) -> None:
    attributes: dict[str, Any] = {"auto_pad": mode, "strides": [2, 3], "kernel_shape": [3, 4]}
    others = {"w": weights(3, 2, 3, 4)} if kind == "Conv" else {}
    case = Case(
        kind=kind, x=x, others=others, trained=("x", *others), attributes=attributes,
        dynamic=(0, 2, 3),
    )  # fmt: skip
    hold(case, oracle="kernel")  # onnx.reference rounds SAME_LOWER down
