"""What is read of a stage's graph, held against the onnx package and ONNX Runtime's own order."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.stage_graphs import Extent, Node, order_nodes, read_stage
from splitonnx.runtime.gate.protobufs import Malformed
from tests.support.zoo import ZOO

FLOAT = TensorProto.FLOAT


def write(nodes: list[NodeProto], **fields: Any) -> bytes:
    graph = helper.make_graph(
        nodes,
        "stage",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", FLOAT, ["N + 1", None])],
        **fields,
    )
    opsets = [helper.make_opsetid("", 18)]
    content: bytes = helper.make_model(graph, opset_imports=opsets).SerializeToString()
    return content


def test_inputs_outputs_and_declared_shapes_are_read() -> None:
    made = helper.make_node("Relu", ["x"], ["y"])
    graph = read_stage(
        write([made], value_info=[helper.make_tensor_value_info("b", TensorProto.BOOL, [2, "M"])])
    )
    assert (graph.inputs, graph.outputs) == (("x",), ("y",))
    assert graph.values == {
        "x": Extent(bits=32, dims=("N", 3)),
        "y": Extent(bits=32, dims=("N + 1", "")),
        "b": Extent(bits=8, dims=(2, "M")),
    }
    (node,) = graph.nodes
    assert node == Node(
        operator="Relu", arguments=("x",), results=("y",), captured=frozenset(), has_body=False
    )


@pytest.mark.parametrize(
    ("dtype", "bits"), [(np.int8, 8), (np.int64, 64), (np.float64, 64), (np.float16, 48)]
)
def test_initializers_and_constants_lie_in_the_graph(dtype: type[np.generic], bits: int) -> None:
    array = np.zeros((2, 5), dtype)
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(array)),
        helper.make_node("Constant", [], ["f"], value_float=0.5),
        helper.make_node("Relu", ["x"], ["y"]),
    ]
    graph = read_stage(write(nodes, initializer=[numpy_helper.from_array(array, "w")]))
    assert graph.constants == {"w", "c", "f"}
    assert graph.values["w"] == graph.values["c"] == Extent(bits=bits, dims=(2, 5))
    assert graph.values["f"] == Extent(bits=32, dims=())


def test_what_bodies_take_from_around_them_is_captured_however_deep() -> None:
    inner = helper.make_graph(
        [helper.make_node("Add", ["deep", "x"], ["i"])],
        "inner",
        [],
        [helper.make_empty_tensor_value_info("far")],
    )
    outer = helper.make_graph(
        [helper.make_node("If", ["flag"], ["o"], then_branch=inner, else_branch=inner)],
        "outer",
        [],
        [],
    )
    nodes = [helper.make_node("If", ["x"], ["y"], then_branch=outer, else_branch=outer)]
    (node,) = read_stage(write(nodes)).nodes
    assert node.has_body
    assert node.arguments == ("x",)
    assert node.captured == {"flag", "deep", "x", "far"}


@pytest.mark.parametrize("name", ["chain", "dropout", "two_streams"])
def test_stages_of_the_zoo_are_read_as_onnx_reads_them(name: str) -> None:

    for content in cut(ZOO[name].build(), at=None).client.graphs.values():
        model = onnx.load_from_string(content)
        graph = read_stage(content)
        assert graph.inputs == tuple(value.name for value in model.graph.input)
        assert graph.outputs == tuple(value.name for value in model.graph.output)
        made = {output for node in model.graph.node for output in node.output}
        assert {result for node in graph.nodes for result in node.results} == made
        assert len(graph.nodes) == len(model.graph.node)
        assert graph.constants >= {tensor.name for tensor in model.graph.initializer}


@pytest.mark.parametrize("content", [b"\x08", b"\x3a\x05ab", b"\x3a\x04\x0a\x02\x2a\x05"])
def test_what_is_no_graph_is_refused(content: bytes) -> None:
    with pytest.raises(Malformed):
        read_stage(content)


# --- the order of running ---------------------------------------------------------------------


def make_random_graph(seed: int) -> list[NodeProto]:
    """Make nodes of one or two inputs each, which take any that came before."""
    generator = random.Random(seed)
    names, nodes = ["x"], []
    for number in range(14):
        inputs = [generator.choice(names) for _ in range(generator.choice((1, 2)))]
        operator = "Add" if len(inputs) == 2 else "Relu"
        nodes.append(helper.make_node(operator, inputs, [f"v{number}"], name=f"n{number}"))
        names.append(f"v{number}")
    return nodes


def run_order(nodes: list[NodeProto], folder: Path) -> list[str]:
    """Let ONNX Runtime run the nodes as they are, and list what it ran in which order."""
    used = {name for node in nodes for name in node.input}
    leaves = [node.output[0] for node in nodes if node.output[0] not in used]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [1])],
        [helper.make_tensor_value_info(name, FLOAT, [1]) for name in leaves],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.run(None, {"x": np.ones(1, np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())
    ending = "_kernel_time"
    return [e["name"].removesuffix(ending) for e in events if e["name"].endswith(ending)]


@pytest.mark.parametrize("seed", range(8))
def test_nodes_are_ordered_as_onnx_runtime_runs_them(seed: int, tmp_path: Path) -> None:
    nodes = make_random_graph(seed)
    read = [
        Node(
            operator=node.name,
            arguments=tuple(node.input),
            results=tuple(node.output),
            captured=frozenset(),
            has_body=False,
        )
        for node in nodes
    ]
    assert [node.operator for node in order_nodes(read)] == run_order(nodes, tmp_path)


def test_a_node_comes_after_what_its_body_captures() -> None:
    def node(name: str, *arguments: str, captured: str = "") -> Node:
        return Node(
            operator=name,
            arguments=arguments,
            results=(name.lower(),),
            captured=frozenset(captured.split()),
            has_body=bool(captured),
        )

    ordered = order_nodes([node("If", "x", captured="late"), node("Late", "x")])
    assert [found.operator for found in ordered] == ["Late", "If"]
