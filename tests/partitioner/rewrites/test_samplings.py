"""Images sampled at places that the graph computes: GridSample and AffineGrid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.support.images import Case, hold, whole


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
