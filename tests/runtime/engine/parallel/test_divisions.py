"""Gradients of weights are taken out of a stage, by what they are themselves; nothing else is."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph
from splitonnx.runtime.engine.parallel.divisions import (
    LEAST,
    ParallelDivision,
    Piece,
    count_products,
    divide,
    separate_gradients,
    write_part,
)

SHAPES: dict[str, tuple[int | str, ...]] = {
    "dy": ("N", 16, 8, 8),
    "x": ("N", 16, 8, 8),
    "w": (16, 16, 3, 3),
    "v": (16, 16, 3, 3),
    "small": (16, 16, 1, 1),
}


def differentiate(gradient: str, image: str, weights: str, *results: str) -> onnx.NodeProto:
    points = [1, 1] if weights == "small" else [3, 3]
    return helper.make_node(
        "ConvGrad", [gradient, image, weights], results, domain="com.microsoft",
        kernel_shape=points, pads=[points[0] // 2] * 4,
    )  # fmt: skip


BACKWARD = [
    helper.make_node("Relu", ["x"], ["y"]),
    differentiate("dy", "y", "w", "y_grad", "w_grad"),
    helper.make_node("Mul", ["y_grad", "y"], ["z"]),
    differentiate("z", "x", "v", "", "v_grad"),
    differentiate("dy", "x", "small", "", "small_grad"),
    helper.make_node("ReduceMean", ["z"], ["mean"], keepdims=0),
]
OUTPUTS = ("w_grad", "v_grad", "small_grad", "mean")


def write_graph(
    nodes: Sequence[onnx.NodeProto] = BACKWARD, outputs: Sequence[str] = OUTPUTS
) -> bytes:
    """Return a backward pass of two convolutions with 3 x 3 points and one with a single point."""
    given = SHAPES | {"z": SHAPES["x"], "y_grad": SHAPES["x"]}
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in given.items()
    }
    inputs = [values[name] for name in SHAPES]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    inner = [values["z"], values["y_grad"]]
    graph = helper.make_graph(nodes, "g", inputs, made, value_info=inner)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return bytes(model.SerializeToString())


def divide_whole(
    nodes: Sequence[onnx.NodeProto] = BACKWARD, outputs: Sequence[str] = OUTPUTS
) -> ParallelDivision:
    division = divide(PlacedGraph(write_graph(nodes, outputs)))
    assert division is not None
    return division


def list_pieces(division: ParallelDivision) -> list[Piece]:
    assert division.trunk is not None
    return [division.trunk, *division.parts]


def list_made(pieces: Sequence[Piece]) -> list[tuple[str, ...]]:
    return [piece.makes for piece in pieces]


def test_large_gradients_of_weights_are_parts_and_small_ones_stay_in_the_trunk() -> None:
    division = divide_whole()
    assert sorted(list_made(division.parts)) == [("v_grad",), ("w_grad",)]
    assert division.trunk is not None
    assert {*division.trunk.makes} == {"y", "z", "small_grad", "mean"}


def test_both_gradients_of_a_convolution_become_two_nodes() -> None:
    model = onnx.load_from_string(separate_gradients(PlacedGraph(write_graph())).content)
    made = [tuple(n.output) for n in model.graph.node if n.op_type == "ConvGrad"]
    assert made == [("y_grad",), ("", "w_grad"), ("", "v_grad"), ("", "small_grad")]
    attributes = [n.attribute for n in model.graph.node if n.op_type == "ConvGrad"]
    assert attributes[0] == attributes[1] == BACKWARD[1].attribute


def test_every_part_reads_only_what_is_there_before_it() -> None:
    division = divide_whole()
    assert division.trunk is not None
    assert {*division.trunk.reads} <= SHAPES.keys()
    known = SHAPES.keys() | {*division.trunk.makes}
    for part in division.parts:
        assert known >= {*part.reads}


def test_what_else_needs_a_gradient_of_weights_keeps_it_in_the_trunk() -> None:
    norm = helper.make_node("ReduceSumSquare", ["v_grad"], ["norm"], keepdims=0)
    division = divide_whole([*BACKWARD, norm], (*OUTPUTS, "norm"))
    assert list_made(division.parts) == [("w_grad",)]


def test_whether_a_gradient_is_a_part_does_not_depend_on_the_others_in_its_stage() -> None:
    alone = divide_whole([BACKWARD[0], differentiate("dy", "y", "w", "", "w_grad")], ("w_grad",))
    assert list_made(alone.parts) == [("w_grad",)]
    assert divide(PlacedGraph(write_graph([BACKWARD[4]], ("small_grad",)))) is None


def test_a_stage_of_gradients_alone_has_no_trunk() -> None:
    division = divide_whole([differentiate("dy", "x", "v", "", "v_grad")], ("v_grad",))
    assert division.trunk is None


def test_products_are_counted_for_one_sample() -> None:
    graph = PlacedGraph(write_graph())
    counts = [count_products(graph, node) for node in graph.nodes]
    assert counts == [0, 16 * 16 * 9 * 64, 0, 16 * 16 * 9 * 64, 16 * 16 * 64, 0]
    assert counts[4] < LEAST <= counts[1]


@pytest.mark.parametrize("name", ["z", "y_grad"])
def test_declared_shapes_are_kept(name: str) -> None:
    division = divide_whole()
    whole = onnx.load_from_string(write_graph()).graph
    (declared,) = (value for value in whole.value_info if value.name == name)
    found = []
    for piece in list_pieces(division):
        content = write_part(division.graph, piece, {"y": "tensor(float)"})
        assert content is not None
        graph = onnx.load_from_string(content).graph
        values = (*graph.value_info, *graph.input, *graph.output)
        found += [value for value in values if value.name == name]
    assert found
    assert all(value == declared for value in found)


def test_a_value_of_a_type_that_cannot_be_declared_is_not_handed_on() -> None:
    division = divide_whole()
    readers = [p for p in list_pieces(division) if "y" in p.reads]
    assert readers
    for piece in readers:
        assert write_part(division.graph, piece, {"y": "seq(tensor(float))"}) is None


def test_a_graph_with_bodies_stays_whole() -> None:
    result = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    inner = helper.make_node("Identity", ["z"], ["inner"])
    body = helper.make_graph([inner], "body", [], [result])
    condition = helper.make_node("Constant", [], ["condition"], value_int=1)
    branch = helper.make_node("If", ["condition"], ["end"], then_branch=body, else_branch=body)
    content = write_graph([*BACKWARD, condition, branch], (*OUTPUTS, "end"))
    assert divide(PlacedGraph(content)) is None
