"""Walks over a graph: what a node reads, what a value depends on, where gradients lead."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.transcripts import serialize
from splitonnx.partitioner.graphs.traversals import (
    ResumedWalk,
    disconnect,
    find_data,
    find_dependents,
    find_last_read,
    find_movers,
    find_moving,
    list_bodies,
    list_inner,
    list_inputs,
    map_values,
    order_lazily,
    prune,
    walk_back,
)
from splitonnx.runtime.engine.stage_graphs import read_stage

FLOAT = TensorProto.FLOAT


def make_graph() -> ir.Graph:
    """``y = tanh(x * w) + v``, ``shape`` of the first, a dead node, and an If that captures ``v``.

    The If's branches hold an If of their own, whose branches read ``w``.
    """
    info = helper.make_tensor_value_info

    def branch(kind: str, nodes: list[onnx.NodeProto], output: str) -> dict[str, Any]:
        return {kind: helper.make_graph(nodes, kind, [], [info(output, FLOAT, None)])}

    inner = helper.make_node(
        "If", ["go"], ["deep"], name="inner",
        **branch("then_branch", [helper.make_node("Neg", ["w"], ["neg"], name="neg")], "neg"),
        **branch("else_branch", [helper.make_node("Exp", ["w"], ["exp"], name="exp")], "exp"),
    )  # fmt: skip
    outer = helper.make_node(
        "If", ["go"], ["chosen"], name="outer",
        **branch("then_branch", [inner, helper.make_node("Add", ["deep", "v"], ["a"])], "a"),
        **branch("else_branch", [], "v"),
    )  # fmt: skip
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["h"], name="mul"),
        helper.make_node("Tanh", ["h"], ["t"], name="tanh"),
        helper.make_node("Add", ["t", "v"], ["y"], name="add"),
        helper.make_node("Shape", ["h"], ["shape"], name="shape"),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"], name="zeros"),
        helper.make_node("Greater", ["y", "zeros"], ["mask"], name="mask"),
        helper.make_node("Exp", ["t"], ["dead"], name="dead"),
        outer,
    ]
    inputs = [info(name, FLOAT, [2]) for name in ("x", "w", "v")]
    inputs.append(info("go", TensorProto.BOOL, []))
    outputs = [
        info("y", FLOAT, [2]),
        info("mask", TensorProto.BOOL, [2]),
        info("chosen", FLOAT, None),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)]
    )
    graph = ir.from_proto(model).graph
    types = {"h": 1, "t": 1, "zeros": 1, "dead": 1, "shape": 7}
    for name, value in map_values(graph).items():
        if name in types:
            value.dtype = ir.DataType(types[name])
    return graph


def find_node(graph: ir.Graph, name: str) -> ir.Node:
    return next(node for node in graph if node.name == name)


def names(values: object) -> set[str]:
    return {value.name or "" for value in values}  # type: ignore[attr-defined]


def pick(graph: ir.Graph, *wanted: str) -> list[ir.Value]:
    values = map_values(graph)
    return [values[name] for name in wanted]


def test_a_node_reads_what_its_bodies_capture_however_deep() -> None:
    graph = make_graph()
    assert names(list_inputs(find_node(graph, "outer"))) == {"go", "v", "w"}
    assert names(list_inputs(find_node(graph, "mul"))) == {"x", "w"}


def test_bodies_and_their_nodes_are_listed_inside_one_another() -> None:
    outer = find_node(make_graph(), "outer")
    assert {body.name for body in list_bodies(outer)} == {"then_branch", "else_branch"}
    assert {node.name for node in list_inner(outer)} >= {"inner", "neg", "exp"}
    assert list_inner(find_node(make_graph(), "mul")) == []


def test_a_walk_back_ends_at_inputs_and_at_what_it_is_told_to_stop_at() -> None:
    graph = make_graph()
    nodes, sources = walk_back(pick(graph, "y"))
    assert names(nodes) == {"mul", "tanh", "add"}
    assert names(sources) == {"x", "w", "v"}
    nodes, sources = walk_back(pick(graph, "y"), stop=pick(graph, "h"))
    assert names(nodes) == {"tanh", "add"}
    assert names(sources) == {"h", "v"}


def test_a_node_among_the_ends_is_collected_and_not_passed() -> None:
    graph = make_graph()
    nodes, sources = walk_back(pick(graph, "y"), ends={find_node(graph, "tanh")})
    assert names(nodes) == {"tanh", "add"}
    assert names(sources) == {"v"}


def test_a_resumed_walk_tells_new_nodes_from_those_it_has_met() -> None:
    graph = make_graph()
    walk = ResumedWalk()
    new, reached, met = walk.explore(pick(graph, "t"), {})
    assert names(new) == {"tanh", "mul"}
    assert names(reached) == {"x", "w"}
    assert met == set()
    walk.nodes.update(new)
    new, reached, met = walk.explore(pick(graph, "y"), {})
    assert names(new) == {"add"}
    assert names(reached) == {"v"}
    assert names(met) == {"tanh"}


@pytest.mark.parametrize(("most", "stopped"), [(0, False), (1, True), (2, True)])
def test_a_resumed_walk_stops_at_a_place_up_to_the_most(most: int, stopped: bool) -> None:
    graph = make_graph()
    (h,) = pick(graph, "h")
    new, reached, _ = ResumedWalk().explore(pick(graph, "t"), {h: 1}, most)
    assert names(new) == ({"tanh"} if stopped else {"tanh", "mul"})
    assert names(reached) == ({"h"} if stopped else {"x", "w"})


def test_dependents_are_all_that_is_computed_from_the_roots() -> None:
    graph = make_graph()
    found = names(find_dependents(graph, pick(graph, "v")))
    assert found == {"v", "y", "mask", "chosen"}


def test_what_depends_on_data_by_their_shape_alone_carries_none() -> None:
    graph = make_graph()
    assert names(find_data(graph, pick(graph, "x"))) == {"x", "h", "t", "y", "mask", "dead"}


def test_what_is_drawn_at_random_carries_data() -> None:
    graph = make_graph()
    drawn = ir.node("RandomNormal", [], {"shape": [2]}, name="drawn")
    drawn.outputs[0].name = "noise"
    graph.append(drawn)
    assert "noise" in names(find_data(graph, []))
    drawn.domain = "my.domain"
    assert names(find_data(graph, [])) == set()


def test_gradients_move_through_floats_only() -> None:
    graph = make_graph()
    found = names(find_moving(graph, pick(graph, "w")))
    assert found == {"w", "h", "t", "y", "dead", "chosen"}  # no shape, no zeros, no mask


def test_no_gradient_passes_a_detached_value() -> None:
    graph = make_graph()
    builder = NodeBuilder("stop")
    t, w, v = pick(graph, "t", "w", "v")
    tanh = find_node(graph, "tanh")
    stopped = builder.detach(t)
    graph.insert_after(tanh, builder.nodes)
    find_node(graph, "add").replace_input_with(0, stopped)
    assert "y" not in names(find_moving(graph, [w]))
    assert find_movers(pick(graph, "y")) == {v}


def test_movers_are_the_sources_that_a_gradient_leads_back_to() -> None:
    graph = make_graph()
    assert names(find_movers(pick(graph, "y"))) == {"x", "w", "v"}
    assert names(find_movers(pick(graph, "mask"))) == set()
    assert names(find_movers(pick(graph, "chosen"))) == {"v", "w"}


def test_pruning_removes_what_no_output_needs() -> None:
    graph = make_graph()
    outer = find_node(graph, "outer")
    graph.outputs.remove(outer.outputs[0])
    prune(graph)
    assert {node.name for node in graph} == {"mul", "tanh", "add", "shape", "zeros", "mask"}
    (w,) = pick(graph, "w")
    assert {node.name for node, _ in w.uses()} == {"mul"}  # the dead bodies read it no longer


def test_disconnected_nodes_use_nothing() -> None:
    graph = make_graph()
    outer = find_node(graph, "outer")
    disconnect(list_inner(outer))
    (w,) = pick(graph, "w")
    assert {node.name for node, _ in w.uses()} == {"mul"}


def test_the_last_value_read_is_the_last_in_the_row_that_a_target_is_or_depends_on() -> None:
    graph = make_graph()
    values = map_values(graph)
    (y,) = [value for value in graph.outputs if value.name == "y"]
    row = [values["x"], y]
    assert find_last_read([values["w"], values["x"], y], row) == {
        values["w"]: -1,
        values["x"]: 0,
        y: 1,
    }
    assert find_last_read([y], row[:1]) == {y: 0}


def build_backward() -> ir.Model:
    """A gradient through five layers: masks and weights' gradients beside the way back."""
    nodes, value = [], "g"
    for layer in range(5):
        nodes.append(helper.make_node("Cast", [f"x{layer}"], [f"mask{layer}"], to=FLOAT))
    for layer in range(5):
        nodes.append(helper.make_node("Mul", [value, f"mask{layer}"], [f"back{layer}"]))
        value = f"back{layer}"
    for layer in reversed(range(5)):
        nodes.append(helper.make_node("ReduceSum", [f"back{layer}"], [f"w{layer}"]))
    inputs = [helper.make_tensor_value_info(f"x{n}", TensorProto.BOOL, [4]) for n in range(5)]
    graph = helper.make_graph(
        nodes,
        "backward",
        [helper.make_tensor_value_info("g", FLOAT, [4]), *inputs],
        [helper.make_tensor_value_info(f"w{n}", FLOAT, None) for n in range(5)],
    )
    opsets = [helper.make_opsetid("", 18)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def list_run(graph: ir.Graph) -> list[str]:
    """List the results of a graph's nodes in the order in which ONNX Runtime computes them."""
    content = serialize(graph, [""])
    ordered = read_stage(content).nodes  # held against ONNX Runtime in its own test
    return [node.results[0] for node in ordered]


def test_masks_are_made_when_they_are_used_and_what_ends_comes_first() -> None:
    graph = build_backward().graph
    assert list_run(graph)[:5] != ["back0", "w0", "mask1", "back1", "w1"]
    before = {node.outputs[0].name for node in graph}
    order_lazily(graph)
    assert {node.outputs[0].name for node in graph} == before
    expected = [f"{name}{n}" for n in range(5) for name in ("mask", "back", "w")]
    assert list_run(graph) == expected


def test_a_graph_stays_in_an_order_in_which_it_can_run() -> None:
    graph = build_backward().graph
    order_lazily(graph)
    made: set[str | None] = {value.name for value in graph.inputs}
    for node in graph:
        assert made >= {value.name for value in node.inputs if value is not None}
        made.update(value.name for value in node.outputs)
