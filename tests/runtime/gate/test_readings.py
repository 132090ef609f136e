"""Tests of reading a graph's nodes, against what the onnx package reads."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx.errors import ForbiddenGraph
from splitonnx.layers import LAYERS, LayerNode
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.gate.readings import GraphNode, read_nodes
from tests.support.zoo import ZOO


def describe_by_onnx(node: onnx.NodeProto) -> LayerNode:
    held = {own.name: own for own in node.attribute}
    kept = held if node.op_type in (*LAYERS, "Transpose") else {}
    return LayerNode(
        operator=node.op_type,
        arguments=tuple(node.input),
        results=tuple(node.output),
        integers={
            name: [*own.ints, *([own.i] if own.type == onnx.AttributeProto.INT else [])]
            for name, own in kept.items()
        },
        equation=kept["equation"].s.decode() if "equation" in kept else "",
    )


def read_by_onnx(content: bytes) -> list[GraphNode]:
    return [
        GraphNode(
            name=node.name,
            operator=node.op_type,
            reads=tuple(dict.fromkeys(name for name in node.input if name)),
            makes=tuple(name for name in node.output if name),
            layer=describe_by_onnx(node),
        )
        for node in onnx.load_from_string(content).graph.node
    ]


def test_attributes_of_layers_are_read_as_onnx_reads_them() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("Gemm", ["t", "w", ""], ["g"], transB=1, alpha=0.5),
        helper.make_node("Conv", ["g", "k"], ["c"], group=3, strides=[2, 2], pads=[0, 1, 0, 1]),
        helper.make_node("Gather", ["v", "c"], ["a"], axis=-1),
        helper.make_node("Einsum", ["a", "m"], ["y"], equation="ab,bc->ac"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], []),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    content = model.SerializeToString()
    assert list(read_nodes("stage", content)) == read_by_onnx(content)


@pytest.mark.parametrize("target", ["training", "portable"])
def test_nodes_are_read_as_onnx_reads_them(target: str) -> None:
    bundle = cut(
        ZOO["batchnorm_trained"].build(),
        at="r1",
        client_target=target,  # type: ignore[arg-type]
        server_target=target,  # type: ignore[arg-type]
    )
    for party in bundle.parties.values():
        for name, graph in party.graphs.items():
            nodes = read_nodes(name, graph)
            assert nodes
            assert list(nodes) == read_by_onnx(graph)


def test_a_node_reads_what_its_bodies_mention_at_any_depth() -> None:
    def body(name: str, *nodes: onnx.NodeProto, output: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        return helper.make_graph(list(nodes), name, [], [value])

    inner = helper.make_node(
        "If", ["d"], ["inner"],
        then_branch=body("a", helper.make_node("Relu", ["x"], ["ra"]), output="ra"),
        else_branch=body("b", output="handed"),
    )  # fmt: skip
    outer = helper.make_node(
        "If", ["c"], ["y"],
        then_branch=body("e", inner, output="inner"),
        else_branch=body("f", helper.make_node("Relu", ["z"], ["rf"]), output="rf"),
    )  # fmt: skip
    model = helper.make_model(
        helper.make_graph([outer], "g", [], []),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    (node,) = read_nodes("stage", model.SerializeToString())
    assert {"c", "d", "x", "z", "handed"} <= set(node.reads)
    assert node.makes == ("y",)


def test_what_the_gate_refuses_is_not_read() -> None:
    with pytest.raises(ForbiddenGraph, match="stage"):
        read_nodes("stage", b"no graph")
