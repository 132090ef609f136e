"""Regions of images pooled to a fixed size: RoiAlign and MaxRoiPool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.support.images import Case, hold, whole


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("coordinates", ["half_pixel", "output_half_pixel"])
@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)])
def test_roi_align(mode: str, ratio: int, coordinates: str, dynamic: Sequence[int]) -> None:
    rois = np.array([[1, 0, 9, 7], [-3, 2, 4, 20], [0.3, 0.2, 2.1, 1.9]], np.float32)
    attributes = {
        "mode": mode, "sampling_ratio": ratio, "coordinate_transformation_mode": coordinates,
        "output_height": 2, "output_width": 3, "spatial_scale": 0.6,
    }  # fmt: skip
    case = Case(
        kind="RoiAlign", x=(2, 2, 5, 6), others={"rois": rois, "images": whole(1, 0, 1)},
        attributes=attributes, dynamic=dynamic,
    )  # fmt: skip
    hold(case, oracle="kernel")


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)])
def test_max_roi_pool(scale: float, dynamic: Sequence[int]) -> None:
    rois = np.array(
        [[1, 0, 1, 4, 3], [0, 2, 2, 5, 4], [1, 1, 1, 1, 1], [0, 3, 3, 9, 8]], np.float32
    )
    attributes = {"pooled_shape": [2, 3], "spatial_scale": scale}
    case = Case(
        kind="MaxRoiPool", x=(2, 2, 5, 6), others={"rois": rois}, attributes=attributes,
        dynamic=dynamic,
    )  # fmt: skip
    hold(case, oracle="kernel")
