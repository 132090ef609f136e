"""Resize in all its modes, by constants and by what is found at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.rewrites import rewrite
from splitonnx.partitioner.rewrites.stretches import COORDINATES
from tests.support.images import Case, build, floats, hold, whole


def resize(x: tuple[int, ...], *, dynamic: Sequence[int] = (0,), **settings: Any) -> Case:
    """A Resize by scales, sizes or a region; the rest are attributes."""
    scales = settings.pop("scales", None)
    sizes = settings.pop("sizes", None)
    others = {
        "roi": settings.pop("roi", floats()),
        "scales" if scales else "none_scales": floats(*(scales or [])),
    }
    if sizes:
        others["sizes"] = whole(*sizes)
    return Case(kind="Resize", x=x, others=others, attributes=settings, dynamic=dynamic, opset=19)


@pytest.mark.parametrize("nearest", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
@pytest.mark.parametrize(
    "coordinates", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
)
@pytest.mark.parametrize("sizes", [(8, 6), (5, 4), (2, 1)])
def test_resize_to_the_nearest(nearest: str, coordinates: str, sizes: tuple[int, int]) -> None:
    case = resize(
        (2, 3, 4, 3), sizes=[2, 3, *sizes], nearest_mode=nearest,
        coordinate_transformation_mode=coordinates,
    )  # fmt: skip
    hold(case)


@pytest.mark.parametrize("antialias", [0, 1])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("sizes", [(8, 6), (3, 5), (1, 7)])
def test_resize_by_weights(mode: str, antialias: int, sizes: tuple[int, int]) -> None:
    case = resize(
        (2, 3, 6, 5), sizes=[2, 3, *sizes], mode=mode, antialias=antialias,
        coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    assert "MatMul" in hold(case)


@pytest.mark.parametrize("exclude", [0, 1])
@pytest.mark.parametrize("coordinates", ["align_corners", "asymmetric", "pytorch_half_pixel"])
def test_resize_by_cubic_weights_of_another_sharpness(coordinates: str, exclude: int) -> None:
    case = resize(
        (2, 1, 4, 4), sizes=[2, 1, 6, 3], mode="cubic", cubic_coeff_a=-0.5,
        coordinate_transformation_mode=coordinates, exclude_outside=exclude,
    )  # fmt: skip
    hold(case)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_of_a_region_that_reaches_beyond_the_image(mode: str) -> None:
    region = floats(0, 0, -0.2, 0.1, 1, 1, 1, 1.4)
    case = resize(
        (2, 1, 4, 4), sizes=[2, 1, 3, 5], mode=mode, roi=region,
        coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=2.5,
    )  # fmt: skip
    hold(case)


@pytest.mark.parametrize("times", [1.0, 2.0, 3.0])
def test_resize_by_whole_factors_takes_any_image_size(times: float) -> None:
    case = resize(
        (2, 3, 4, 3), dynamic=(0, 1, 2, 3), scales=[1, 1, times, 2], mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    assert "Expand" in hold(case)


def test_resize_of_volumes() -> None:
    case = resize((2, 1, 3, 4, 2), scales=[1, 1, 2, 1.5, 2], mode="linear")
    hold(case)


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_resize_of_any_image_size(mode: str, coordinates: str, sized: bool) -> None:
    settings: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    settings |= {"sizes": [2, 3, 7, 4]} if sized else {"scales": [1, 1, 2, 1.5]}
    if coordinates == "align_corners" and not sized:
        settings["scales"] = [1, 1, 2, 1.25]
    if coordinates == "half_pixel_symmetric" and not sized:
        settings["scales"] = [1, 1, 0.7, 1.4]  # the middle stays where sizes are rounded
    hold(resize((2, 3, 5, 4), dynamic=(0, 1, 2, 3), **settings))


@pytest.mark.parametrize("exclude", [0, 1])
def test_resize_by_cubic_weights_of_any_image_size(exclude: int) -> None:
    case = resize(
        (2, 1, 5, 4), dynamic=(0, 2, 3), mode="cubic", scales=[1, 1, 0.6, 2.5],
        cubic_coeff_a=-0.5, exclude_outside=exclude,
    )  # fmt: skip
    hold(case)


def test_resize_with_antialias_wants_a_fixed_image_size() -> None:
    settings: dict[str, Any] = {"mode": "cubic", "scales": [1, 1, 0.5, 0.5]}
    settings["coordinate_transformation_mode"] = "half_pixel_symmetric"
    case = resize((2, 3, 5, 4), dynamic=(0, 2, 3), antialias=1, **settings)
    with pytest.raises(UnsupportedModel) as caught:
        hold(case)
    assert str(caught.value) == (
        "node 'node' (Resize): the size of 'x' along axis 2, before or after, is not known; fix it "
        "with --dim NAME=SIZE, or export it without antialias"
    )
    hold(resize((2, 3, 5, 4), dynamic=(0, 2, 3), **settings))  # as advised
    hold(resize((2, 3, 5, 4), dynamic=(0,), antialias=1, **settings))


def test_resize_of_a_region_wants_a_fixed_image_size() -> None:
    case = resize(
        (2, 1, 4, 4), dynamic=(0, 2, 3), sizes=[2, 1, 3, 5], mode="linear",
        roi=floats(0, 0, 0, 0.1, 1, 1, 1, 1), coordinate_transformation_mode="tf_crop_and_resize",
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="without the coordinate_transformation_mode 'tf_"):
        hold(case)


def test_resize_to_an_absurd_size_is_refused() -> None:
    case = resize((2, 3, 5, 4), mode="linear", sizes=[2, 3, 2**40, 4])
    with pytest.raises(UnsupportedModel, match=r"'node' \(Resize\): its attributes ask for tables"):
        rewrite(ir.from_proto(build(case)), case.trained)
