"""Every mode of Pad, and CenterCropPad."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.support.images import Case, floats, hold, whole


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("dynamic", [(0,), (0, 1, 2, 3)])
@pytest.mark.parametrize(
    ("pads", "axes"),
    [
        ([0, 0, 1, 2, 0, 0, 2, 0], None),
        ([0, 0, -1, 1, 0, 0, 1, -2], None),
        ([1, 2, 0, 1], [-1, 2]),
        ([-1, -1], [3]),
    ],
)
def test_padding(
    mode: str, dynamic: Sequence[int], pads: list[int], axes: list[int] | None
) -> None:
    others = {"pads": whole(*pads), "value": np.array(1.5, np.float32)}
    if axes is not None:
        others["axes"] = whole(*axes)
    case = Case(
        kind="Pad",
        x=(2, 2, 4, 5),
        others=others,
        attributes={"mode": mode},
        dynamic=dynamic,
        opset=19,
    )
    negative = min(pads) < 0
    hold(case, oracle="kernel" if negative else "both")


def test_padding_with_a_trained_value() -> None:
    others = {"pads": whole(1, 2, 0, 1), "value": floats(1.5), "axes": whole(2, 3)}
    hold(Case(kind="Pad", x=(2, 2, 4, 5), others=others, trained=("x", "value")))


@pytest.mark.parametrize("dynamic", [(0,), (0, 1, 2, 3)])
@pytest.mark.parametrize("sizes", [(3, 8), (7, 4), (2, 2)])
def test_center_crop_pad(sizes: tuple[int, int], dynamic: Sequence[int]) -> None:
    case = Case(
        kind="CenterCropPad", x=(2, 2, 4, 5), others={"sizes": whole(*sizes)},
        attributes={"axes": [2, -1]}, dynamic=dynamic,
    )  # fmt: skip
    hold(case)
