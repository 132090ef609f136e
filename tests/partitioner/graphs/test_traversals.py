"""Walks over a graph: what a node reads, what a value depends on, where gradients lead."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from splitonnx.partitioner.graphs.builders import NodeBuilder
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
    prune,
    walk_back,
)

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
