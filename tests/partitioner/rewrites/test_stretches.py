"""Interpolation that the graph computes: what numbers say in advance, for sizes of run time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites import interpolations
from splitonnx.partitioner.rewrites.interpolations import Kernel, Sampling
from splitonnx.partitioner.rewrites.shape_rules import Extent, to_vector
from splitonnx.partitioner.rewrites.stretches import COORDINATES, Stretch, find_after

SIZES = [(4, 8), (5, 3), (6, 7), (4, 1), (1, 4)]


def run(
    write: Callable[[NodeBuilder, ir.Value, ir.Value, ir.Value], ir.Value],
    before: int,
    after: int,
    scale: float,
) -> np.ndarray:
    """Evaluate what is written of sizes and a scale that come as data."""
    i64, f32 = ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.FLOAT)
    inputs = [
        ir.Value(name="before", type=i64, shape=ir.Shape([1])),
        ir.Value(name="after", type=i64, shape=ir.Shape([1])),
        ir.Value(name="scale", type=f32, shape=ir.Shape([])),
    ]
    builder = NodeBuilder("axis")
    result = builder.op("Identity", write(builder, *inputs))
    graph = ir.Graph(inputs, [result], nodes=builder.nodes, opset_imports={"": 18}, name="g")
    feeds = {"before": np.array([before]), "after": np.array([after]), "scale": np.float32(scale)}
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    (found,) = ReferenceEvaluator(model).run(None, {n: np.asarray(a) for n, a in feeds.items()})
    return np.asarray(found)


def stretch(
    builder: NodeBuilder, before: Extent, after: Extent, scale: float | ir.Value, coordinates: str
) -> Stretch:
    return Stretch(
        builder=builder, before=before, after=after, scale=scale, coordinates=coordinates
    )


def sample(before: int, after: int, coordinates: str) -> Sampling:
    return Sampling(before=before, after=after, scale=after / before, coordinates=coordinates)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_coordinates_are_those_of_fixed_sizes(coordinates: str, before: int, after: int) -> None:
    found = run(
        lambda builder, b, a, s: stretch(builder, b, a, s, coordinates).find_coordinates(),
        before, after, after / before,
    )  # fmt: skip
    expected = interpolations.find_coordinates(sample(before, after, coordinates))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (2, 1)])
def test_the_nearest_element_is_that_of_fixed_sizes(
    coordinates: str, mode: str, before: int, after: int
) -> None:
    found = run(
        lambda builder, b, a, s: stretch(builder, b, a, s, coordinates).find_nearest(mode),
        before, after, after / before,
    )  # fmt: skip
    expected = interpolations.find_nearest(sample(before, after, coordinates), mode)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize(
    "kernel",
    [
        Kernel(mode="linear"),
        Kernel(mode="cubic"),
        Kernel(mode="cubic", sharpness=-0.5, exclude_outside=True),
    ],
)
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_weights_are_those_of_fixed_sizes(
    coordinates: str, kernel: Kernel, before: int, after: int
) -> None:
    found = run(
        lambda builder, b, a, s: stretch(builder, b, a, s, coordinates).weigh_neighbours(kernel),
        before, after, after / before,
    )  # fmt: skip
    expected = interpolations.weigh_neighbours(sample(before, after, coordinates), kernel)
    assert found.shape == (after, before)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("before", "scale"), [(5, 2.0), (5, 0.5), (7, 1.5), (3, 1 / 3)])
def test_a_scaled_size_is_rounded_down(before: int, scale: float) -> None:
    expected = [int(np.floor(np.float32(before) * np.float32(scale)))]
    found = run(
        lambda builder, b, a, s: to_vector(builder, find_after(builder, b, s)), before, 0, scale
    )
    assert found.tolist() == expected
    found = run(
        lambda builder, b, a, s: to_vector(builder, find_after(builder, before, scale)),
        before,
        0,
        scale,
    )
    assert found.tolist() == expected
