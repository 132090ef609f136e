"""Values with slopes of their own: the value to the last bit, the slope as it was written down."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.partitioner.differentiation.gradients import differentiate
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.tangents import Tangent, bound_slope, follow_tangents

FLOAT = ir.DataType.FLOAT


def make_input(name: str, *dims: int) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(dims))


def run(graph: ir.Graph | ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    model = graph if isinstance(graph, ir.Model) else ir.Model(graph, ir_version=9)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [value.name for value in session.get_outputs()]
    used = {value.name for value in session.get_inputs()}
    found = session.run(None, {n: a for n, a in feeds.items() if n in used})
    return dict(zip(names, found, strict=True))


def build(slopes: dict[str, float], *shapes: tuple[int, ...]) -> ir.Graph:
    """Build sign(x) (which has no gradient), and for each of ``slopes`` a tangent of that slope."""
    builder = NodeBuilder("value")
    inputs = [make_input(name, *shape) for name, shape in zip(slopes, shapes, strict=True)]
    points = [builder.detach(value) for value in inputs]
    value = builder.op("Sign", points[0])
    tangents = [
        Tangent(source=source, point=point, slope=builder.number(slope, FLOAT))
        for source, point, slope in zip(inputs, points, slopes.values(), strict=True)
    ]
    made = follow_tangents(builder, value, tangents)
    made.type, made.shape = ir.TensorType(FLOAT), ir.Shape(shapes[0])
    loss = builder.op("ReduceSum", made, keepdims=0)
    loss.name, loss.type, loss.shape = "loss", ir.TensorType(FLOAT), ir.Shape([])
    made.name = "y"
    return ir.Graph(inputs, [loss, made], nodes=builder.nodes, opset_imports={"": 18}, name="g")


def test_the_value_is_the_operators_own() -> None:
    x = np.array([-1e30, -0.3, 0.0, 7.0], np.float32)
    found = run(build({"x": 0.5}, (4,)), {"x": x})["y"]
    np.testing.assert_array_equal(found, np.sign(x))


def test_the_slopes_are_those_that_were_written_down() -> None:
    graph = build({"x": 0.5, "w": -3.0}, (4,), (4,))
    joint = differentiate(ir.Model(graph, ir_version=9), ["x", "w"], "loss")
    feeds = {"x": np.array([-2, -0.3, 0, 7], np.float32), "w": np.ones(4, np.float32)}
    found = run(joint, feeds)
    np.testing.assert_array_equal(found["x_grad"], np.full(4, 0.5))
    np.testing.assert_array_equal(found["w_grad"], np.full(4, -3.0))


def test_an_infinite_point_gives_no_number() -> None:
    found = run(build({"x": 0.5}, (2,)), {"x": np.array([np.inf, 1.0], np.float32)})["y"]
    assert np.isnan(found[0])
    assert found[1] == 1.0


@pytest.mark.parametrize("dtype", [FLOAT, ir.DataType.DOUBLE])
def test_an_infinite_slope_becomes_the_largest_number(dtype: ir.DataType) -> None:
    slope = ir.Value(name="slope", type=ir.TensorType(dtype), shape=ir.Shape([4]))
    builder = NodeBuilder("bound")
    made = builder.op("Identity", bound_slope(builder, slope, dtype))
    made.name, made.type = "y", ir.TensorType(dtype)
    graph = ir.Graph([slope], [made], nodes=builder.nodes, opset_imports={"": 18}, name="g")
    values = np.array([np.inf, -np.inf, 2.5, np.nan], dtype.numpy())
    most = np.finfo(dtype.numpy()).max
    np.testing.assert_array_equal(run(graph, {"slope": values})["y"], [most, -most, 2.5, np.nan])
