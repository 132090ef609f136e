"""A stage that computes nothing hands its inputs on, and only then."""

from __future__ import annotations

import gc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx.errors import StageFailed, StageStopped
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph
from splitonnx.runtime.engine.tiles.renamings import RenamedSession, find_sources

SHAPES: dict[str, tuple[int | str, ...]] = {"a": (2, 3), "b": ()}
COPIES = [("a", "x"), ("b", "y")]


def write(
    pairs: list[tuple[str, str]],
    outputs: str = "x y",
    *,
    kind: int = TensorProto.FLOAT,
    operator: str = "Identity",
    rows: int | str = 2,
) -> bytes:
    """Serialize a graph of nodes of one operator, each with one input and one result."""
    shapes = {**SHAPES, "a": (rows, 3)}
    graph = helper.make_graph(
        [helper.make_node(operator, [source], [result]) for source, result in pairs],
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs.split()],
    )
    opsets = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def draw() -> dict[str, np.ndarray]:
    return {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(7, np.float32)}


@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_the_inputs_without_a_copy(training: bool) -> None:
    engine = Engine(threads=1)
    content = write([*COPIES, ("x", "z")], "z y x")
    stage = engine.load("gradients", content, training=training)
    assert isinstance(stage.session, RenamedSession)
    feeds = {name: engine.from_array(array) for name, array in draw().items()}
    outputs = engine.run(stage, feeds)
    assert list(outputs) == ["z", "y", "x"]
    assert outputs["z"] is outputs["x"] is feeds["a"]
    assert outputs["y"] is feeds["b"]


def test_an_output_outlives_the_stage_that_made_what_it_is() -> None:
    engine = Engine(threads=1)
    constant = helper.make_tensor("c", TensorProto.FLOAT, (2, 3), np.arange(6.0))
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["a"], value=constant)],
        "g",
        [],
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, (2, 3))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    first = engine.load("constant", model.SerializeToString(), training=True)
    second = engine.load("gradients", write(COPIES), training=True)
    feeds = {**engine.run(first, {}), "b": engine.from_array(draw()["b"])}
    found = engine.to_array(engine.run(second, feeds)["x"])
    del engine, first, second, feeds
    gc.collect()
    np.testing.assert_array_equal(found, draw()["a"])


@pytest.mark.parametrize(
    "content",
    [
        write([*COPIES, ("x", "z")], "z", operator="Neg"),
        write([("a", "x")], "x b"),
        write(COPIES, kind=TensorProto.INT64),
        write(COPIES, rows="N"),
        write([("a", "x"), ("missing", "y")]),
    ],
    ids=["Neg", "an input that is an output", "integers", "a batch", "no source"],
)
def test_other_graphs_are_left_to_onnx_runtime(content: bytes) -> None:
    assert find_sources(PlacedGraph(write(COPIES))) == {"x": "a", "y": "b"}
    assert find_sources(PlacedGraph(content)) == {}


def test_an_operator_of_another_domain_is_not_taken_for_identity() -> None:
    model = onnx.load_from_string(write(COPIES))
    model.graph.node[0].domain = "another"
    assert find_sources(PlacedGraph(model.SerializeToString())) == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a": np.ones((3, 2), np.float32)}, r"'a' has the shape \[3, 2\] instead of \[2, 3\]"),
        ({"b": np.array(1.0)}, "'b' is a tensor.double. instead"),
    ],
)
def test_inputs_that_are_not_as_declared_are_refused(
    change: dict[str, np.ndarray], reason: str
) -> None:
    engine = Engine(threads=1)
    stage = engine.load("gradients", write(COPIES), training=True)
    feeds = {name: engine.from_array(array) for name, array in {**draw(), **change}.items()}
    with pytest.raises(StageFailed, match=f"^stage 'gradients' failed: input {reason}"):
        engine.run(stage, feeds)
    with pytest.raises(StageFailed, match="'b' is missing"):
        engine.run(stage, {"a": engine.from_array(draw()["a"])})


def test_a_stopped_engine_hands_nothing_on() -> None:
    engine = Engine(threads=1)
    stage = engine.load("gradients", write(COPIES), training=True)
    engine.stop()
    with pytest.raises(StageStopped):
        engine.run(stage, {name: engine.from_array(array) for name, array in draw().items()})
