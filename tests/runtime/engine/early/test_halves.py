"""What is waited for comes first, and both halves compute what the whole graph does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.runtime.engine.builds.installed import import_onnxruntime
from splitonnx.runtime.engine.early.halves import GraphHalves, divide
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph

SHAPES: Mapping[str, tuple[int | str, ...]] = {"x": ("N", 3), "dz": ("N", 2), "w": (3, 2)}
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64

RELU = helper.make_node("Relu", ["x"], ["h"])
DOUBLED = helper.make_node("Add", ["dz", "dz"], ["dy"])
GRADIENT = helper.make_node("MatMul", ["dy", "turned"], ["dx"])
TURNED = helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0])
FLIPPED = helper.make_node("Transpose", ["h"], ["flipped"], perm=[1, 0])
WEIGHTS = helper.make_node("MatMul", ["flipped", "dy"], ["dw"])
STEP = (RELU, DOUBLED, TURNED, FLIPPED, WEIGHTS, GRADIENT)


def write_graph(*nodes: onnx.NodeProto, outputs: str, declared: str = "") -> bytes:
    inputs = [helper.make_tensor_value_info(n, FLOAT, shape) for n, shape in SHAPES.items()]
    made = [helper.make_tensor_value_info(n, FLOAT, None) for n in outputs.split()]
    known = [helper.make_tensor_value_info(n, FLOAT, ("N", 2)) for n in declared.split()]
    held = [numpy_helper.from_array(np.array([-1], np.int64), "last")]
    graph = helper.make_graph(nodes, "g", inputs, made, held, value_info=known)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def halve(*nodes: onnx.NodeProto, outputs: str, declared: str = "") -> GraphHalves | None:
    content = write_graph(*nodes, outputs=outputs, declared=declared)
    return divide(PlacedGraph(content), {"dx"})


def list_operators(content: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(content).graph.node]


def draw() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = {n: [4 if s == "N" else int(s) for s in shape] for n, shape in SHAPES.items()}
    return {name: random.standard_normal(size, np.float32) for name, size in sizes.items()}


def test_what_the_gradient_of_weights_alone_needs_comes_later() -> None:
    halves = halve(*STEP, outputs="dx dw")
    assert halves is not None
    assert list_operators(halves.first) == ["Add", "Transpose", "MatMul"]
    assert (halves.outputs, halves.handed) == (("dx",), ("dy",))
    rest = halves.write_rest({"dy": "tensor(float)"})
    assert list_operators(rest) == ["Relu", "Transpose", "MatMul"]
    assert [output.name for output in onnx.load_from_string(rest).graph.output] == ["dw"]


def test_the_halves_one_after_the_other_compute_what_the_whole_graph_does() -> None:
    halves = halve(*STEP, outputs="dx dw dy")
    assert halves is not None
    assert halves.outputs == ("dx", "dy")
    feeds = draw()
    names = [output.name for output in onnx.load_from_string(halves.first).graph.output]
    made = dict(zip(names, ReferenceEvaluator(halves.first).run(None, feeds), strict=True))
    handed = {name: made[name] for name in halves.handed}
    rest = halves.write_rest({"dy": "tensor(float)"})
    (dw,) = ReferenceEvaluator(rest).run(None, feeds | handed)
    np.testing.assert_array_equal(dw, np.maximum(feeds["x"], 0).T @ (2 * feeds["dz"]))
    np.testing.assert_array_equal(made["dx"], (2 * feeds["dz"]) @ feeds["w"].T)


def test_values_of_any_type_are_handed_on_and_constants_are_in_both() -> None:
    one = helper.make_node("Constant", [], ["one"], value_ints=[1])
    nodes = (
        one,
        helper.make_node("Shape", ["dz"], ["size"]),
        helper.make_node("Mul", ["size", "one"], ["same"]),
        helper.make_node("Reshape", ["dz", "same"], ["dy"]),
        TURNED,
        GRADIENT,
        helper.make_node("Reshape", ["dz", "same"], ["again"]),
        helper.make_node("Transpose", ["x"], ["across"], perm=[1, 0]),
        helper.make_node("MatMul", ["across", "again"], ["most"]),
        helper.make_node("ReduceSum", ["most", "last"], ["some"], keepdims=1),
        helper.make_node("Cast", ["one"], ["unit"], to=FLOAT),
        helper.make_node("Mul", ["some", "unit"], ["dw"]),
    )
    content = write_graph(*nodes, outputs="dx dw")
    halves = divide(PlacedGraph(content), {"dx"})
    assert halves is not None
    assert halves.handed == ("same",)
    runtime = import_onnxruntime()
    opened = halves.open(
        lambda graph: runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    )
    feeds = draw()
    dx, same = opened.first.run(None, feeds)
    (dw,) = opened.rest.run(None, feeds | {"same": same})
    assert same.dtype == np.int64
    np.testing.assert_allclose(dx, feeds["dz"] @ feeds["w"].T, rtol=1e-6)
    np.testing.assert_allclose(
        dw, (feeds["x"].T @ feeds["dz"]).sum(1, keepdims=True), rtol=1e-5, atol=1e-6
    )


def test_a_graph_that_would_hand_on_another_type_stays_whole() -> None:
    nodes = (
        helper.make_node("Cast", ["dz"], ["short"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["short"], ["dy"], to=FLOAT),
        TURNED,
        GRADIENT,
        helper.make_node("Cast", ["short"], ["again"], to=FLOAT),
        helper.make_node("Transpose", ["x"], ["flipped"], perm=[1, 0]),
        helper.make_node("MatMul", ["flipped", "again"], ["dw"]),
    )
    halves = halve(*nodes, outputs="dx dw")
    assert halves is not None
    runtime = import_onnxruntime()
    opened = halves.open(
        lambda graph: runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    )
    assert [output.name for output in opened.get_outputs()] == ["dx", "dw"]


def test_declared_shapes_are_kept_at_the_boundary() -> None:
    halves = halve(*STEP, outputs="dx dw", declared="dy")
    assert halves is not None
    rest = onnx.load_from_string(halves.write_rest({}))
    for values in (onnx.load_from_string(halves.first).graph.output, rest.graph.input):
        (shape,) = [v.type.tensor_type.shape.dim for v in values if v.name == "dy"]
        assert [dim.dim_param or dim.dim_value for dim in shape] == ["N", 2]


@pytest.mark.parametrize(
    "nodes",
    [
        (DOUBLED, TURNED, GRADIENT),
        (DOUBLED, TURNED, GRADIENT, helper.make_node("ReduceSum", ["dy", "last"], ["dw"])),
    ],
)
def test_a_graph_whose_rest_takes_no_time_stays_whole(nodes: tuple[onnx.NodeProto, ...]) -> None:
    outputs = " ".join(name for node in nodes[-2:] for name in node.output if name != "turned")
    assert halve(*nodes, outputs=outputs) is None


def test_a_graph_with_bodies_stays_whole() -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["dw"], ["inner"])], "body", [],
        [helper.make_tensor_value_info("inner", FLOAT, None)],
    )  # fmt: skip
    asked = helper.make_node("Constant", [], ["asked"], value=helper.make_tensor("", 9, [], [1]))
    chosen = helper.make_node("If", ["asked"], ["z"], then_branch=body, else_branch=body)
    assert halve(*STEP, asked, chosen, outputs="dx dw z") is None


def test_a_stage_that_sends_nothing_is_not_divided() -> None:
    engine = Engine(threads=1)
    content = write_graph(*STEP, outputs="dx dw")
    assert engine.load("body", content, training=True).then is None
    stage = engine.load("body", content, training=True, early=("dx",))
    assert stage.then is not None
    assert (stage.outputs, stage.handed, stage.then.outputs) == (("dx", "dy"), ("dy",), ("dw",))
    chosen = stage.choose(("dx",))
    assert (chosen.outputs, chosen.handed, chosen.then) == (("dx",), (), None)
