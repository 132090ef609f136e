"""Images sampled at places and regions: GridSample, AffineGrid, RoiAlign, MaxRoiPool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.support.images import Case, hold, weights, whole


def draw_grid(image: Sequence[int], places: Sequence[int], *, corners: bool) -> np.ndarray:
    """Draw places inside of the image and around it, away from where a gradient jumps."""
    random = np.random.default_rng(8)
    lines = []
    for n in reversed(image):
        pixel = random.integers(-3, n + 3, (2, *places)) + random.uniform(0.15, 0.4, (2, *places))
        lines.append(pixel / (n - 1) * 2 - 1 if corners else (2 * pixel + 1) / n - 1)
    return np.stack(lines, axis=-1).astype(np.float32)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("dynamic", [(0,), (0, 1, 2, 3)])
def test_grid_sample(mode: str, padding: str, corners: bool, dynamic: Sequence[int]) -> None:
    trained = ("x",) if mode == "nearest" else ("x", "grid")
    attributes = {"mode": mode, "padding_mode": padding, "align_corners": int(corners)}
    case = Case(
        kind="GridSample", x=(2, 3, 4, 5),
        others={"grid": draw_grid((4, 5), (3, 4), corners=corners)}, trained=trained,
        attributes=attributes, dynamic=dynamic,
    )  # fmt: skip
    hold(case, oracle="kernel")  # onnx.reference places samples in float32


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_sample_of_volumes(padding: str) -> None:
    others = {"grid": draw_grid((3, 4, 5), (2, 2, 2), corners=False)}
    case = Case(
        kind="GridSample", x=(2, 2, 3, 4, 5), others=others, trained=("x", "grid"),
        attributes={"padding_mode": padding},
    )  # fmt: skip
    hold(case, oracle="kernel")


@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("sizes", [(2, 1, 3, 4), (2, 1, 2, 3, 4)])
def test_affine_grid(sizes: tuple[int, ...], corners: int) -> None:
    rank = len(sizes) - 2
    case = Case(
        kind="AffineGrid", x=(2, rank, rank + 1), others={"size": whole(*sizes)},
        attributes={"align_corners": corners},
    )  # fmt: skip
    hold(case, oracle="kernel")


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
