"""Images sampled at places that the graph computes: GridSample and AffineGrid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from onnx import ModelProto

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.partitions import cut
from tests.support.images import Case, hold, whole
from tests.support.nets import FLOAT, Net
from tests.support.small_models import hold_predictions


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


def build_transformer(height: int | str) -> ModelProto:
    """A spatial transformer: each image of a batch is turned as a layer says."""
    net = Net(opset=20)
    places = net.constant("places", np.array([2, 3]))
    pooled = net.op("ReduceMean", "x", places, out="pooled", keepdims=0)
    lines = net.op("MatMul", pooled, net.weight("w", 3, 6), out="lines")
    theta = net.op("Reshape", lines, net.constant("form", np.array([-1, 2, 3])), out="theta")
    grid = net.op("AffineGrid", theta, net.op("Shape", "x", out="sizes"), out="grid")
    seen = net.op("GridSample", "x", grid, out="seen")
    scaled = net.op("Mul", seen, net.weight("gain", 1, 3, 1, 1), out="scaled")
    net.op("ReduceMean", scaled, places, out="y", keepdims=0)
    return net.finish({"x": (FLOAT, ["N", 3, height, 4])}, "y", 3)


def test_an_affine_grid_reads_the_size_of_its_images_and_not_that_of_the_batch() -> None:
    model = build_transformer(5)
    images = np.random.default_rng(3).standard_normal((4, 3, 5, 4), np.float32)
    hold_predictions(cut(model, at="seen", loss="mse"), model, {"x": images})


def test_an_affine_grid_of_unknown_size_names_the_option_that_fixes_it() -> None:
    model = build_transformer("H")
    with pytest.raises(UnsupportedModel, match=r"AffineGrid.* --dim H=SIZE"):
        cut(model, at="seen", loss="mse")
    images = np.random.default_rng(3).standard_normal((4, 3, 5, 4), np.float32)
    hold_predictions(cut(model, at="seen", loss="mse", dims={"H": 5}), model, {"x": images})
