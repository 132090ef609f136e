"""Sizes that operators tie to each other, and those that may differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import pytest

from splitonnx.partitioner.cutting.passes.equal_sizes import join_sizes

Shapes = Sequence[Sequence[int | str]]


def build(kind: str, shapes: Shapes, **attributes: Any) -> ir.Graph:
    """Build a graph of one node whose inputs have these shapes."""
    inputs = [ir.Value(name=f"i{n}", shape=ir.Shape(dims)) for n, dims in enumerate(shapes)]
    node = ir.node(kind, inputs, attributes, name="node")
    node.outputs[0].name, node.outputs[0].shape = "y", ir.Shape(["N"])
    return ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 18})


def list_shapes(graph: ir.Graph) -> list[list[Any]]:
    return [
        [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
        for value in graph.inputs
    ]


@pytest.mark.parametrize(
    ("kind", "attributes", "shapes", "joined"),
    [
        ("GatherND", {"batch_dims": 1}, [["N", 4], ["M", 1]], [["N", 4], ["N", 1]]),
        (
            "GatherND", {"batch_dims": 2},
            [["N", "A", 4], ["M", "B", 1]], [["N", "A", 4], ["N", "A", 1]],
        ),
        ("Concat", {"axis": 1}, [["N", 4], ["M", 5], ["K", 6]], [["N", 4], ["N", 5], ["N", 6]]),
        ("Concat", {"axis": -1}, [["N", "A"], ["M", "B"]], [["N", "A"], ["N", "B"]]),
        ("MatMul", {}, [["N", "A", "B"], ["M", "C", 4]], [["N", "A", "B"], ["M", "B", 4]]),
        ("MatMul", {}, [["N", "B"], ["C"]], [["N", "B"], ["B"]]),
        ("Gemm", {"transA": 1, "transB": 1}, [["A", 3], [4, "B"]], [["A", 3], [4, "A"]]),
        (
            "LSTM", {"hidden_size": 3},
            [["T", "N", 4], [1, 12, 4], [1, 12, 3], [1, 24], ["M"], [1, "K", 3], [1, "L", 3]],
            [["T", "N", 4], [1, 12, 4], [1, 12, 3], [1, 24], ["N"], [1, "N", 3], [1, "N", 3]],
        ),
        ("ReverseSequence", {"batch_axis": 0}, [["N", "T"], ["M"]], [["N", "T"], ["N"]]),
        ("RoiAlign", {}, [["N", 3, 8, 8], ["R", 4], ["S"]], [["N", 3, 8, 8], ["R", 4], ["R"]]),
        ("SoftmaxCrossEntropyLoss", {}, [["N", 5, "H"], ["M", "K"]], [["N", 5, "H"], ["N", "H"]]),
    ],
)  # fmt: skip
def test_tied_sizes_get_the_first_name(
    kind: str, attributes: dict[str, Any], shapes: Shapes, joined: Shapes
) -> None:
    graph = build(kind, shapes, **attributes)
    assert join_sizes(graph, ())
    assert list_shapes(graph) == joined
    assert graph.outputs[0].shape is None
    assert not join_sizes(graph, ())


@pytest.mark.parametrize(
    ("kind", "attributes", "shapes"),
    [
        ("Add", {}, [["N", 4], ["M", 4]]),
        ("MatMul", {}, [["N", 2, 3], ["M", 3, 4]]),
        ("GatherND", {"batch_dims": 0}, [["N", 4], ["M", 1]]),
        ("Concat", {"axis": 0}, [["N", 4], ["M", 4]]),
        ("Concat", {"axis": 1}, [["N", 4], [2, 5]]),
        ("Concat", {"axis": 1}, [["N", 4], ["M", "M + 1"]]),
    ],
)
def test_sizes_that_may_differ_keep_their_names(
    kind: str, attributes: dict[str, Any], shapes: Shapes
) -> None:
    graph = build(kind, shapes, **attributes)
    assert not join_sizes(graph, ())
    assert list_shapes(graph) == [list(dims) for dims in shapes]
    assert graph.outputs[0].shape is not None


def test_weights_keep_their_shapes_and_names_are_joined_over_several_nodes() -> None:
    graph = build("Concat", [["N", 4], ["M", 4]], axis=1)
    assert not join_sizes(graph, ["i1"])
    second = ir.Value(name="i2", shape=ir.Shape(["K", 1]))
    graph.inputs.append(second)
    graph.append(ir.node("GatherND", [graph.inputs[1], second], {"batch_dims": 1}, name="more"))
    assert join_sizes(graph, ())
    assert list_shapes(graph) == [["N", 4], ["N", 4], ["N", 1]]
