"""Only values of steady inputs that are moved are taken out, and both graphs give the whole."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.runtime.engine.invariants.divisions import GraphDivision, divide, find_origins
from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph

SHAPES: dict[str, tuple[int | str, ...]] = {
    "x": ("N", 16, 5, 5),
    "w": (16, 32, 3, 3),
    "v": (16, 32, 3, 3),
    "small": (16, 1, 3, 3),
}
TURNED = helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0, 2, 3])
MIRRORED = helper.make_node("Slice", ["turned", "ends", "starts", "axes", "ends"], ["mirrored"])
CONVOLVED = helper.make_node("Conv", ["x", "mirrored"], ["y"], pads=[1] * 4)


def write_graph(*nodes: onnx.NodeProto, outputs: str = "y") -> bytes:
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in SHAPES.items()
    ]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs.split()]
    lists = {"ends": [-1, -1], "starts": [-9, -9], "axes": [2, 3], "shape": [32, 16, 9]}
    held = [numpy_helper.from_array(np.array(numbers), name) for name, numbers in lists.items()]
    graph = helper.make_graph(nodes, "g", inputs, made, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def divide_graph(*nodes: onnx.NodeProto, outputs: str = "y") -> GraphDivision | None:
    return divide(PlacedGraph(write_graph(*nodes, outputs=outputs)), {"w", "small"})


def list_operators(content: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(content).graph.node]


def draw() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(
            [2 if size == "N" else int(size) for size in shape], np.float32
        )
        for name, shape in SHAPES.items()
    }


def test_weights_that_are_turned_and_mirrored_are_taken_out() -> None:
    division = divide_graph(TURNED, MIRRORED, CONVOLVED)
    assert division is not None
    assert list_operators(division.invariant) == ["Transpose", "Slice"]
    assert list_operators(division.rest) == ["Conv"]
    assert (division.reads, division.handed) == (("w",), ("mirrored",))


def test_the_two_graphs_one_after_the_other_compute_what_the_whole_graph_does() -> None:
    constant = helper.make_node("Constant", [], ["order"], value_ints=list(range(31, -1, -1)))
    picked = helper.make_node("Gather", ["mirrored", "order"], ["picked"], axis=0)
    other = helper.make_node("Conv", ["x", "picked"], ["z"], pads=[1] * 4)
    nodes = (constant, TURNED, MIRRORED, picked, CONVOLVED, other)
    whole, feeds = write_graph(*nodes, outputs="y z"), draw()
    division = divide_graph(*nodes, outputs="y z")
    assert division is not None
    assert division.handed == ("mirrored", "picked")
    handed = ReferenceEvaluator(division.invariant).run(None, {"w": feeds["w"]})
    made = dict(zip(division.handed, handed, strict=True))
    found = ReferenceEvaluator(division.rest).run(None, feeds | made)
    expected = ReferenceEvaluator(whole).run(None, feeds)
    for array, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, right)


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Transpose", ["v"], ["turned"], perm=[1, 0, 2, 3])],
        [helper.make_node("Transpose", ["small"], ["turned"], perm=[1, 0, 2, 3])],
        [helper.make_node("Mul", ["w", "w"], ["turned"])],
        [helper.make_node("RandomNormalLike", ["w"], ["turned"])],
        [
            helper.make_node("Size", ["x"], ["size"]),
            helper.make_node("Gather", ["w", "size"], ["turned"]),
        ],
    ],
    ids=["not steady", "too small", "computed", "random", "by an input"],
)
def test_nothing_else_is_taken_out(nodes: list[onnx.NodeProto]) -> None:
    used = helper.make_node("Neg", ["turned"], ["y"])
    assert divide_graph(*nodes, used) is None


def test_declared_shapes_are_kept() -> None:
    model = onnx.load_from_string(write_graph(TURNED, MIRRORED, CONVOLVED))
    for name, shape in (("mirrored", (32, 16, 3, 3)), ("y", ("N", 32, 5, 5))):
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        model.graph.value_info.append(value)
    division = divide(PlacedGraph(model.SerializeToString()), {"w"})
    assert division is not None
    rest = onnx.load_from_string(division.rest).graph
    assert rest.value_info == model.graph.value_info
    assert rest.input[-1] == model.graph.value_info[0]


def test_what_a_graph_returns_stays_in_it() -> None:
    assert divide_graph(TURNED, MIRRORED, CONVOLVED, outputs="y turned") is None


def test_a_graph_with_bodies_stays_whole() -> None:
    inner = helper.make_node("Identity", ["turned"], ["inner"])
    result = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    body = helper.make_graph([inner], "body", [], [result])
    branch = helper.make_node("If", ["condition"], ["y"], then_branch=body, else_branch=body)
    condition = helper.make_node("Constant", [], ["condition"], value_int=1)
    assert divide_graph(TURNED, condition, branch) is None


def test_what_is_kept_has_the_values_of_one_steady_input() -> None:
    picked = helper.make_node("Gather", ["mirrored", "axes"], ["picked"], axis=0)
    other = helper.make_node("Conv", ["x", "picked"], ["z"], pads=[1] * 4)
    graph = PlacedGraph(write_graph(TURNED, MIRRORED, picked, CONVOLVED, other, outputs="y z"))
    assert find_origins(graph, {"w"}) == {"mirrored": "w", "picked": "w"}
    assert find_origins(graph, {"v"}) == {}
