"""Bodies copied into the graph around them: bound, named apart, and the original untouched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.partitioner.graphs.bodies import copy_body

FLOAT = TensorProto.FLOAT


def make_model() -> ir.Model:
    """A loop over ``x -> tanh(x + shift) * w``, whose ``w`` is captured; ``unused`` is not read."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Add", ["state", "shift"], ["sum"], name="add"),
            helper.make_node("Tanh", ["sum"], ["bent"]),
            helper.make_node("Mul", ["bent", "w"], ["next"], name="mul"),
        ],
        "body",
        [info("turn", TensorProto.INT64, []), info("go", TensorProto.BOOL, []),
         info("state", FLOAT, [2])],
        [info("go", TensorProto.BOOL, []), info("next", FLOAT, [2])],
        [numpy_helper.from_array(np.array([0.5, -0.25], "f"), "shift")],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Loop", ["times", "go_on", "x"], ["y"], name="loop", body=body)],
        "outer",
        [info("times", TensorProto.INT64, []), info("x", FLOAT, [2]), info("w", FLOAT, [2]),
         info("go_on", TensorProto.BOOL, []), info("number", TensorProto.INT64, [])],
        [info("y", FLOAT, [2])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return ir.from_proto(model)


def get_body(model: ir.Model) -> ir.Graph:
    return model.graph[0].attributes["body"].as_graph()


def find(model: ir.Model, *names: str) -> list[ir.Value]:
    values = {value.name: value for value in model.graph.inputs}
    return [values[name] for name in names]


def unroll(model: ir.Model, times: int) -> onnx.ModelProto:
    """Put as many copies of the body in the place of the loop."""
    body = get_body(model)
    number, go, state = find(model, "number", "go_on", "x")
    nodes: list[ir.Node] = []
    for index in range(times):
        copied, outputs = copy_body(body, f"run{index}", [number, go, state])
        nodes += copied
        state = outputs[1]
    loop = model.graph[0]
    model.graph.outputs.clear()
    model.graph.remove(loop)
    model.graph.extend(nodes)
    state.type, state.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2])
    model.graph.outputs.append(state)
    return ir.to_proto(model)


def evaluate(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    (found,) = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(found)


def make_feeds(times: int) -> dict[str, np.ndarray]:
    return {
        "times": np.array(times),
        "x": np.array([0.3, -0.7], "f"),
        "w": np.array([1.5, 0.75], "f"),
        "go_on": np.array(True),
        "number": np.array(0),
    }


def test_copies_in_a_row_compute_what_the_loop_does() -> None:
    feeds = make_feeds(3)
    expected = evaluate(ir.to_proto(make_model()), feeds)
    unrolled = unroll(make_model(), 3)
    onnx.checker.check_model(unrolled)
    np.testing.assert_allclose(evaluate(unrolled, feeds), expected, rtol=1e-6)


def test_every_node_and_value_of_a_copy_bears_its_prefix() -> None:
    model = make_model()
    nodes, outputs = copy_body(get_body(model), "run", find(model, "number", "go_on", "x"))
    names = _names_of(nodes)
    assert all(name.startswith("run/") for name in names)
    assert len(set(names)) == len(names)
    assert outputs[1].name == "run/next"


def _names_of(nodes: Sequence[ir.Node]) -> list[str]:
    values = [value.name or "" for node in nodes for value in node.outputs]
    return [*(node.name or "" for node in nodes), *values]


def test_an_input_that_is_handed_through_becomes_what_it_is_bound_to() -> None:
    model = make_model()
    number, go, state = find(model, "number", "go_on", "x")
    _, outputs = copy_body(get_body(model), "run", [number, go, state])
    assert outputs[0] is go


def test_shapes_of_a_body_are_forgotten_and_the_captured_value_is_the_outer_one() -> None:
    model = make_model()
    nodes, outputs = copy_body(get_body(model), "run", find(model, "number", "go_on", "x"))
    assert outputs[1].shape is None
    (w,) = find(model, "w")
    assert [node.name for node in nodes if w in node.inputs] == ["run/mul"]


def test_the_body_itself_is_left_as_it_was() -> None:
    model = make_model()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    copied, _ = copy_body(get_body(model), "run", find(model, "number", "go_on", "x"))
    assert all(node.graph is None for node in copied)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
