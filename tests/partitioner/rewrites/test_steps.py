"""Step functions let values pass and stop gradients."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx import helper

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import find_moving
from splitonnx.partitioner.rewrites.steps import rewrite_step
from tests.partitioner.rewrites.elementwise import draw, weigh
from tests.support.derivatives import assert_differentiable
from tests.support.differentiations import hold_gradients
from tests.support.zoo import Net


@pytest.mark.parametrize("kind", ["Ceil", "Floor", "Hardmax", "Round", "Sign"])
def test_a_step_function_stops_gradients_but_not_values(kind: str) -> None:
    net = Net()
    step = net.op(kind, weigh(net, 5), out="step")
    net.op("Mul", step, net.constant("v", draw(0.5, 2, 5)), out="y")
    assert_differentiable(net, {"x": draw(-3, 3, 4, 5)})


@pytest.mark.parametrize("kind", ["Ceil", "Floor", "Round", "Sign", "Hardmax"])
def test_a_step_is_the_operator_itself_on_inputs_that_no_gradient_leaves(kind: str) -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3, 4]))
    node = ir.node(kind, [x], {"axis": 0} if kind == "Hardmax" else {}, name="step")
    builder = NodeBuilder("step/rewritten")
    (made,) = rewrite_step(builder, node)
    assert [written.op_type for written in builder.nodes] == ["Identity", kind]
    assert made not in find_moving(ir.Graph([x], [made], nodes=builder.nodes), [x])
    assert set(builder.nodes[1].attributes) == set(node.attributes)


def test_the_scale_of_dynamic_quantization_has_a_gradient() -> None:
    """The scale is (max(x, 0) - min(x, 0)) / 255; only those two elements of x move it."""
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"])
    hold_gradients([node], {"x": draw(-3, 4, 3, 5)}, ["scale"], opset=18, entries=15)


def test_where_nothing_is_negative_the_least_does_not_move_the_scale() -> None:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"])
    hold_gradients([node], {"x": draw(1, 4, 3, 5)}, ["scale"], opset=18, entries=15)
