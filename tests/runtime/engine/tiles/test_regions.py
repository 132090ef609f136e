"""Which nodes of a graph are computed tile by tile, and which never."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph
from splitonnx.runtime.engine.tiles.regions import Region, find_regions, find_replaced
from tests.support.tiled_stages import LARGE

FLOAT = TensorProto.FLOAT


def node(operator: str, arguments: str, result: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, arguments.split(), [result], **attributes)


def write_graph(
    *nodes: onnx.NodeProto, outputs: str = "y", kind: int = FLOAT, inner: Sequence[str] = ()
) -> bytes:
    """Serialize a graph that reads large ``x`` and ``w``, a row, and numbers of rank 0, 1 and 3."""
    shapes = {"x": LARGE, "w": LARGE, "row": (4,), "rate": (), "one": (1,), "deep": (1, 1, 1)}
    inputs = [helper.make_tensor_value_info(n, kind, shape) for n, shape in shapes.items()]
    made = [helper.make_tensor_value_info(name, kind, None) for name in outputs.split()]
    held = [
        numpy_helper.from_array(np.array([1, 1, 1]), "three"),
        numpy_helper.from_array(np.array(0), "first"),
        numpy_helper.from_array(np.array(0.5, np.float32), "half"),
    ]
    claims = [helper.make_tensor_value_info(name, kind, ()) for name in inner]
    graph = helper.make_graph(nodes, "g", inputs, made, held, value_info=claims)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def find(*nodes: onnx.NodeProto, **others: Any) -> tuple[Region, ...]:
    return find_regions(PlacedGraph(write_graph(*nodes, **others)))


STEP = [node("Mul", "x rate", "change"), node("Sub", "w change", "y")]


def test_a_region_is_described_by_what_it_reads_and_what_is_read_of_it() -> None:
    (region,) = find(*STEP, node("Neg", "y", "z"), outputs="y z")
    assert [made.operator for made in region.nodes] == ["Mul", "Sub", "Neg"]
    assert region.shape == LARGE
    assert (region.arrays, region.scalars) == (("x", "w"), ("rate",))
    assert region.outputs == ("y", "z")


def test_nodes_that_share_no_large_value_are_regions_of_their_own() -> None:
    twice = [node("Mul", "x half", "a"), node("Add", "a half", "y")]
    other = [node("Mul", "w rate", "b"), node("Abs", "b", "z")]
    assert [region.arrays for region in find(*twice, *other, outputs="y z")] == [("x",), ("w",)]


def test_numbers_are_followed_through_the_operators_that_compute_them() -> None:
    numbers = [
        node("Cast", "rate", "wide", to=TensorProto.DOUBLE),
        node("Pow", "wide wide", "power"),
        node("Cast", "power", "narrow", to=FLOAT),
        node("Reshape", "narrow three", "shaped"),
        node("Concat", "one row", "joined", axis=0),
        node("Gather", "joined first", "picked"),
        node("ReduceSum", "joined", "sum", keepdims=0),
        node("Min", "sum half", "least"),
    ]
    for number in ("narrow", "picked", "least", "one"):
        (region,) = find(*numbers, node("Mul", f"x {number}", "a"), node("Sub", "w a", "y"))
        assert region.scalars == (number,)


def test_a_number_with_more_dimensions_than_the_tensor_is_none() -> None:
    assert not find(node("Mul", "x deep", "change"), node("Sub", "w change", "y"))
    shaped = node("Reshape", "rate three", "shaped")
    assert not find(shaped, node("Mul", "x shaped", "change"), node("Sub", "w change", "y"))


def test_what_a_graph_claims_of_values_within_is_not_believed() -> None:
    """A row that is declared as a number would be read as one."""
    hidden = node("Softmax", "row", "number")
    step = [node("Mul", "x number", "change"), node("Sub", "w change", "y")]
    assert not find(hidden, *step, inner=["number"])


def test_rows_are_not_spread_over_tiles() -> None:
    assert not find(node("Mul", "x row", "change"), node("Sub", "w change", "y"))


def test_a_result_that_another_operator_reads_is_not_computed_in_tiles() -> None:
    assert not find(*STEP, node("ReduceSum", "change", "z"), outputs="y z")
    assert find(*STEP, node("ReduceSum", "x", "z"), outputs="y z")


def test_a_large_value_that_another_operator_makes_is_not_read_in_tiles() -> None:
    assert not find(node("Sigmoid", "x", "a"), node("Neg", "a", "b"), node("Abs", "b", "y"))


def test_operators_that_are_not_exact_or_alone_stay_where_they_are() -> None:
    assert not find(node("Mul", "x rate", "y"))
    assert not find(node("Exp", "x", "a"), node("Log", "a", "y"))
    assert not find(node("Min", "x w", "a"), node("Max", "a w", "y"))


def test_tensors_of_other_types_stay_where_they_are() -> None:
    assert find(*STEP)
    assert not find(*STEP, kind=TensorProto.DOUBLE)
    assert not find(*STEP, kind=TensorProto.FLOAT16)


def test_small_tensors_stay_where_they_are() -> None:
    assert not find(node("Mul", "row rate", "a"), node("Sub", "row a", "y"))


def test_a_graph_in_which_a_name_is_made_twice_is_left_as_it_is() -> None:
    """ONNX Runtime refuses it, and is to see it."""
    assert not find(*STEP, node("Neg", "x", "change"))
    assert not find(*STEP, node("Neg", "w", "x"))


def test_a_graph_whose_nodes_have_bodies_is_left_as_it_is() -> None:
    """A body may read a value of the graph around it."""
    made = helper.make_tensor_value_info("b", FLOAT, None)
    body = helper.make_graph([node("Neg", "change", "b")], "body", [], [made])
    chosen = [
        node("Cast", "rate", "flag", to=TensorProto.BOOL),
        helper.make_node("If", ["flag"], ["z"], then_branch=body, else_branch=body),
    ]
    assert not find(*STEP, *chosen, outputs="y z")


def test_nodes_with_too_few_inputs_or_results_are_left_to_onnx_runtime() -> None:
    """The gate does not count them, and ONNX Runtime is to refuse them."""
    for odd in (node("Gather", "row", "g"), helper.make_node("Abs", ["x"], [])):
        assert len(find(*STEP, odd)) == 1
    nameless = [helper.make_node("Neg", ["x"], [""]), helper.make_node("Abs", [""], ["y"])]
    assert not find(*nameless)


@pytest.mark.parametrize(
    ("nodes", "sums", "expected"),
    [
        ([node("Mul", "x rate", "a"), node("Add", "w a", "y")], {"w": "y"}, {"y": "w"}),
        ([node("Mul", "x rate", "a"), node("Add", "a w", "y")], {"w": "y"}, {"y": "w"}),
        ([node("Mul", "x rate", "a"), node("Add", "w a", "y")], {"x": "y"}, {}),
        ([node("Mul", "x rate", "a"), node("Add", "w a", "y")], {"w": "z", "row": "y"}, {}),
        ([node("Mul", "w rate", "a"), node("Add", "w a", "y")], {"w": "y"}, {}),
        ([node("Mul", "x rate", "a"), node("Add", "w w", "b"), node("Add", "b a", "y")],
         {"w": "y"}, {}),
    ],
    ids=["first", "second", "earlier", "others", "twice", "squared"],
)  # fmt: skip
def test_an_input_is_written_over_if_only_the_node_that_replaces_it_reads_it(
    nodes: list[onnx.NodeProto], sums: dict[str, str], expected: dict[str, str]
) -> None:
    graph = PlacedGraph(write_graph(*nodes))
    (region,) = find_regions(graph)
    assert find_replaced(graph, region, sums) == expected


def test_an_input_that_is_itself_an_output_is_not_written_over() -> None:
    content = write_graph(node("Mul", "x rate", "a"), node("Add", "w a", "y"), outputs="y w")
    graph = PlacedGraph(content)
    (region,) = find_regions(graph)
    assert find_replaced(graph, region, {"w": "y"}) == {}
