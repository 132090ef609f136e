"""Interpolation as numbers: matrices that reproduce the onnx evaluator's Resize along one axis."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.partitioner.rewrites.interpolations import (
    Kernel,
    Sampling,
    find_coordinates,
    find_nearest,
    find_outside,
    weigh_neighbours,
)

COORDINATES = ["align_corners", "asymmetric", "half_pixel", "pytorch_half_pixel"]


def resize(x: np.ndarray, after: int, mode: str, **attributes: object) -> np.ndarray:
    """Resize a vector by onnx's own evaluator, in float64."""
    sizes = numpy_helper.from_array(np.array([after]), "sizes")
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode=mode, **attributes)  # type: ignore[arg-type]
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [len(x)])],
        [onnx.ValueInfoProto(name="y")], [sizes],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    (found,) = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(found)


def sample(before: int, after: int, coordinates: str = "half_pixel") -> Sampling:
    return Sampling(before=before, after=after, scale=after / before, coordinates=coordinates)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize(("before", "after"), [(4, 8), (5, 3), (6, 7), (4, 1)])
def test_the_matrix_is_that_of_resize(coordinates: str, mode: str, before: int, after: int) -> None:
    if after == 1 and coordinates == "pytorch_half_pixel":
        # the definition says 0, which onnx's own evaluator takes for -0.5
        assert find_coordinates(sample(before, after, coordinates)).tolist() == [0.0]
        return
    x = np.random.default_rng(0).standard_normal(before)
    matrix = weigh_neighbours(sample(before, after, coordinates), Kernel(mode=mode))
    expected = resize(x, after, mode, coordinate_transformation_mode=coordinates)
    assert matrix.shape == (after, before)
    np.testing.assert_allclose(matrix @ x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", [
    Kernel(mode="linear"), Kernel(mode="linear", antialias=True), Kernel(mode="cubic"),
    Kernel(mode="cubic", antialias=True), Kernel(mode="cubic", exclude_outside=True),
    Kernel(mode="cubic", sharpness=-0.5),
])  # fmt: skip
@pytest.mark.parametrize(("before", "after"), [(4, 9), (9, 4), (7, 7)])
def test_the_weights_of_each_output_add_up_to_one(kernel: Kernel, before: int, after: int) -> None:
    matrix = weigh_neighbours(sample(before, after), kernel)
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-12)


def test_antialiasing_reads_more_neighbours_where_it_shrinks() -> None:
    plain, smooth = (
        weigh_neighbours(sample(12, 3), Kernel(mode="linear", antialias=antialias))
        for antialias in (False, True)
    )
    assert ((plain != 0).sum(1) <= 2).all()
    assert ((smooth != 0).sum(1) > 4).all()
    x = np.random.default_rng(1).standard_normal(12)
    np.testing.assert_allclose(smooth @ x, resize(x, 3, "linear", antialias=1), rtol=1e-6)


@pytest.mark.parametrize("mode", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
@pytest.mark.parametrize("coordinates", ["asymmetric", "half_pixel"])
@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (5, 7)])
def test_the_nearest_element_is_that_of_resize(
    mode: str, coordinates: str, before: int, after: int
) -> None:
    x = np.arange(float(before))
    places = find_nearest(sample(before, after, coordinates), mode)
    expected = resize(
        x, after, "nearest", nearest_mode=mode, coordinate_transformation_mode=coordinates
    )
    np.testing.assert_array_equal(x[places], expected)


def test_corners_that_are_aligned_map_to_each_other() -> None:
    places = find_coordinates(sample(5, 9, "align_corners"))
    assert (places[0], places[-1]) == (0.0, 4.0)
    np.testing.assert_array_equal(find_coordinates(sample(5, 1, "align_corners")), [0.0])
    np.testing.assert_array_equal(find_coordinates(sample(5, 1, "pytorch_half_pixel")), [0.0])


def test_what_is_cropped_lies_outside_and_has_no_weights() -> None:
    cropped = Sampling(before=4, after=5, scale=1.25, coordinates="tf_crop_and_resize",
                       start=-0.5, end=1.5)  # fmt: skip
    places = find_coordinates(cropped)
    np.testing.assert_allclose(places, np.linspace(-1.5, 4.5, 5))
    outside = find_outside(cropped)
    np.testing.assert_array_equal(outside, (places < 0) | (places > 3))
    matrix = weigh_neighbours(cropped, Kernel(mode="linear"))
    assert not matrix[outside].any()
    assert not find_outside(sample(4, 5)).any()


def test_an_axis_is_identical_only_whole_and_at_scale_one() -> None:
    assert sample(4, 4).identical
    assert not sample(4, 5).identical
    assert not Sampling(before=4, after=4, scale=1.2, coordinates="half_pixel").identical
    cropped = Sampling(before=4, after=4, scale=1.0, coordinates="tf_crop_and_resize", end=0.5)
    assert not cropped.identical
