"""Bodies copied into the graph around them: bound, named apart, and the original untouched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.partitioner.graphs.bodies import (
    build_scan,
    copy_body,
    list_entries,
    list_exits,
    runs_backwards,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder

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


@pytest.mark.parametrize("backwards", [False, True])
def test_a_scan_sums_up_from_either_end(backwards: bool) -> None:
    def declare(name: str, *dims: int) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))

    state, row, first, rows = (
        declare("a", 2),
        declare("b", 2),
        declare("s", 2),
        declare("x", 3, 2),
    )
    inner, outer = NodeBuilder("step"), NodeBuilder("scan")
    total = inner.op("Add", state, row)
    results = [inner.op("Identity", total), inner.op("Identity", total)]
    for value in results:
        value.type, value.shape = state.type, state.shape
    body = ir.Graph([state, row], results, nodes=inner.nodes, name="step")
    made = build_scan(outer, body, [first], [rows], backwards=backwards)
    assert runs_backwards(outer.nodes[0]) == backwards
    graph = ir.Graph([first, rows], made, nodes=outer.nodes, opset_imports={"": 18}, name="g")
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    last, sums = session.run(None, {"s": np.ones(2, np.float32), "x": x})
    expected = np.cumsum(x[::-1], 0)[::-1] if backwards else np.cumsum(x, 0)
    np.testing.assert_array_equal(sums, expected + 1)
    np.testing.assert_array_equal(last, x.sum(0) + 1)


def name_pairs(pairs: Sequence[tuple[ir.Value, Sequence[ir.Value]]]) -> dict[str, list[str]]:
    return {v.name or "": [one.name or "" for one in held] for v, held in pairs}


def test_what_a_loop_carries_is_its_input_or_what_the_last_step_made() -> None:
    (loop,) = make_model().graph
    entries = {"turn": [], "go": ["go_on", "go"], "state": ["x", "next"]}
    assert name_pairs(list_entries(loop)) == entries
    assert name_pairs(list_exits(loop)) == {"y": ["next", "x"]}


def test_a_scan_hands_rows_to_its_body_and_stacks_what_it_makes() -> None:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Add", ["h", "row"], ["sum"])],
        "body",
        [info("h", FLOAT, [2]), info("row", FLOAT, [2])],
        [info("sum", FLOAT, [2]), info("row", FLOAT, [2])],
    )
    scan = helper.make_node("Scan", ["h0", "rows"], ["end", "all"], body=body, num_scan_inputs=1)
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Neg", ["end"], [name])], name, [], [info(name, FLOAT, [2])]
        )
        for name in ("then", "else")
    }
    choice = helper.make_node("If", ["flag"], ["chosen"], **branches)
    graph = helper.make_graph(
        [scan, choice],
        "outer",
        [info("h0", FLOAT, [2]), info("rows", FLOAT, [3, 2]), info("flag", TensorProto.BOOL, [])],
        [info("chosen", FLOAT, [2]), info("all", FLOAT, [3, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    steps, branch = ir.from_proto(model).graph
    assert name_pairs(list_entries(steps)) == {"h": ["h0", "sum"], "row": ["rows"]}
    assert name_pairs(list_exits(steps)) == {"end": ["sum", "h0"], "all": ["row"]}
    assert name_pairs(list_entries(branch)) == {}
    assert sorted(name_pairs(list_exits(branch))["chosen"]) == ["else", "then"]
