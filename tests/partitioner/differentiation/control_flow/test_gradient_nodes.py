"""The nodes beside a backward step: names, sums of parts, zeros, and what is declared."""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.differentiation.control_flow.gradient_nodes import GradientNodes


def make_value(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 3]))


def test_a_value_of_the_graph_is_represented_by_one_of_the_same_name() -> None:
    nodes, w = GradientNodes("loop"), make_value("w")
    own = nodes.refer(w)
    assert own is not w
    assert nodes.refer(w) is own
    assert (own.name, own.shape) == ("w", w.shape)
    assert nodes.refer(w, "_grad").name == "w_grad"


def test_parts_are_added_and_a_value_without_parts_gets_zeros() -> None:
    nodes, w, v, p = GradientNodes("loop"), make_value("w"), make_value("v"), make_value("p")
    for part in ("first", "second"):
        nodes.add(w, make_value(part))
    nodes.add(v, make_value("third"))
    totals = nodes.total([w, v, p, w])
    producers = {value.name: total.producer() for value, total in totals.items()}
    kinds = {name: node.op_type for name, node in producers.items() if node is not None}
    assert kinds == {"w": "Sum", "v": "Identity", "p": "Identity"}
    assert [total.name for total in totals.values()] == [
        f"loop/argument/{index}_grad" for index in range(3)
    ]
    assert "Expand" in [node.op_type for node in nodes.serialize()]


def test_known_types_and_shapes_are_declared() -> None:
    nodes, w = GradientNodes("loop"), make_value("w")
    made = nodes.builder.op("Neg", nodes.refer(w))
    nodes.builder.op("Abs", made)
    made.type, made.shape = w.type, w.shape
    assert [info.name for info in nodes.declare()] == [made.name]
    assert [list(node.input) for node in nodes.serialize()] == [["w"], [made.name]]
