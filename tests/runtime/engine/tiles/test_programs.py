"""A region's program and the rest of its graph compute together what the graph does."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph
from splitonnx.runtime.engine.tiles.programs import (
    list_rest,
    name_array,
    name_output,
    name_scalar,
    write_program,
    write_rest,
)
from splitonnx.runtime.engine.tiles.regions import find_regions
from tests.runtime.engine.tiles.test_regions import node, write_graph
from tests.support.tiled_stages import LARGE

NODES = [
    node("Exp", "rate", "grown"),
    node("Mul", "x grown", "change"),
    node("Sub", "w change", "y"),
    node("Div", "y half", "z"),
    node("Add", "row one", "small"),
]
OUTPUTS = "z small y"


def test_program_and_rest_compute_what_the_whole_graph_does() -> None:
    content = write_graph(*NODES, outputs=OUTPUTS)
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(LARGE, np.float32) for name in ("x", "w")}
    feeds |= {"row": np.arange(4, dtype=np.float32), "one": np.ones(1, np.float32)}
    feeds |= {"rate": np.array(0.3, np.float32), "deep": np.ones((1, 1, 1), np.float32)}
    expected = dict(zip(OUTPUTS.split(), ReferenceEvaluator(content).run(None, feeds), strict=True))
    graph = PlacedGraph(content)
    (region,) = find_regions(graph)

    rest = ReferenceEvaluator(write_rest(graph, [region])).run(None, feeds)
    values = {**feeds, **dict(zip(list_rest(graph, [region]), rest, strict=True))}
    np.testing.assert_array_equal(values["small"], expected["small"])
    given = {name_array(i): values[name].ravel() for i, name in enumerate(region.arrays)}
    given |= {name_scalar(i): values[name] for i, name in enumerate(region.scalars)}
    wanted = [name_output(i) for i in range(len(region.outputs))]
    found = ReferenceEvaluator(write_program(graph, region)).run(wanted, given)
    for name, array in zip(region.outputs, found, strict=True):
        np.testing.assert_array_equal(array, np.asarray(expected[name]).ravel())


def test_the_rest_has_the_graphs_other_outputs_and_the_numbers_of_the_regions() -> None:
    graph = PlacedGraph(write_graph(*NODES, outputs=OUTPUTS))
    regions = find_regions(graph)
    assert list_rest(graph, regions) == ("small", "grown", "half")
    model = onnx.load_from_string(write_rest(graph, regions))
    assert [made.op_type for made in model.graph.node] == ["Exp", "Add"]
    assert [value.name for value in model.graph.output] == ["small", "grown", "half"]


def test_a_graph_of_regions_alone_leaves_no_rest() -> None:
    step = [node("Mul", "x rate", "change"), node("Sub", "w change", "y")]
    graph = PlacedGraph(write_graph(*step))
    assert list_rest(graph, find_regions(graph)) == ()


def test_regions_that_differ_only_in_names_have_the_same_program() -> None:
    first = [node("Mul", "x half", "a"), node("Add", "a rate", "y")]
    second = [node("Mul", "w one", "b"), node("Add", "b half", "z")]
    graph = PlacedGraph(write_graph(*first, *second, outputs="y z"))
    one, other = (write_program(graph, region) for region in find_regions(graph))
    assert one == other


def test_regions_that_compute_something_else_have_other_programs() -> None:
    second = {
        "another operator": [node("Mul", "w half", "b"), node("Sub", "b rate", "z")],
        "the same number twice": [node("Mul", "w half", "b"), node("Add", "b half", "z")],
        "one output more": [node("Mul", "w half", "b"), node("Add", "b rate", "z")],
        "another order": [node("Mul", "half w", "b"), node("Add", "b rate", "z")],
    }
    first = [node("Mul", "x half", "a"), node("Add", "a rate", "y")]
    for name, nodes in second.items():
        outputs = "y z b" if name == "one output more" else "y z"
        graph = PlacedGraph(write_graph(*first, *nodes, outputs=outputs))
        one, other = (write_program(graph, region) for region in find_regions(graph))
        assert one != other, name


def test_a_program_imports_the_operators_of_the_graphs_version() -> None:
    graph = PlacedGraph(write_graph(*NODES, outputs=OUTPUTS))
    (region,) = find_regions(graph)
    for content in (write_program(graph, region), write_rest(graph, [region])):
        model = onnx.load_from_string(content)
        assert list(model.opset_import) == [helper.make_opsetid("", 18)]
        assert model.ir_version == 9
