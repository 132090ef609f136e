"""Bodies of Scans: inputs, values around them, copies of nodes, and outputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.partitioner.differentiation.control_flow.bodies import BodyWriter
from splitonnx.partitioner.graphs.traversals import list_inner

FLOAT = ir.DataType.FLOAT
INTEGER = ir.TensorType(ir.DataType.INT64)


def make_value(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape([2, 3]))


def write() -> tuple[ir.Graph, ir.Value]:
    """Write a body that multiplies its input by a value around it, and adds a constant."""
    x, held, around = make_value("x"), make_value("own"), make_value("w")
    constant = ir.Value(name="c", const_value=ir.tensor(np.ones((2, 3), np.float32)))
    product = ir.node("Mul", [x, held], name="product")
    total = ir.node("Add", [product.outputs[0], constant], name="total")
    ir.Graph([x, held], [], nodes=[product, total], initializers=[constant], name="step")
    total.outputs[0].type, total.outputs[0].shape = x.type, x.shape
    writer = BodyWriter("scan/body")
    writer.read(x)
    writer.hold(held, around)
    writer.copy([product, total])
    writer.show(total.outputs[0])
    writer.show(total.outputs[0])
    writer.show_zeros(x)
    return writer.finish(), around


def test_a_body_has_names_of_its_own() -> None:
    body, _ = write()
    names = [value.name or "" for node in body for value in node.outputs]
    names += [value.name or "" for value in body.inputs]
    assert all(name.startswith("scan/body/") for name in names)
    assert len(set(names)) == len(names)


def test_what_is_held_is_read_around_the_body() -> None:
    body, around = write()
    assert [use.node.op_type for use in around.uses()] == ["Mul"]
    assert len(body.inputs) == 1


def test_constants_become_nodes_of_the_body() -> None:
    body, _ = write()
    assert not body.initializers
    kinds = [node.op_type for node in body]
    assert kinds == [
        "Mul",
        "Constant",
        "Add",
        "Identity",
        "Identity",
        "Constant",
        "Shape",
        "Expand",
    ]


def test_every_output_is_a_value_of_its_own_with_a_type() -> None:
    body, _ = write()
    assert len(set(body.outputs)) == 3
    assert all(v.dtype == FLOAT and v.shape is not None for v in body.outputs)


def test_what_was_not_copied_is_not_known() -> None:
    with pytest.raises(KeyError):
        BodyWriter("scan/body").show(make_value("x"))


def test_a_loop_reads_rows_from_the_last_to_the_first_and_adds_up() -> None:
    sequence = np.arange(12, dtype=np.float32).reshape(4, 3)
    row, total = make_value("row"), make_value("total")
    row.shape = total.shape = ir.Shape([3])
    around, last = make_value("sequence"), ir.Value(name="last", type=INTEGER, shape=ir.Shape([]))
    writer = BodyWriter("loop/body")
    number = writer.count()
    writer.read(total)
    writer.pick(row, around, last, number)
    writer.add(total, row)
    writer.show(row)
    attribute = ir.AttrGraph("body", writer.finish())
    most, first = ir.Value(name="most", type=INTEGER, shape=ir.Shape([])), make_value("first")
    loop = ir.Node("", "Loop", [most, None, first], [attribute], num_outputs=2, name="loop")
    for name, value in zip(("sum", "rows"), loop.outputs, strict=True):
        value.name, value.type = name, first.type
    around.shape, first.shape = ir.Shape([4, 3]), ir.Shape([3])
    inputs = [most, last, around, first]
    graph = ir.Graph(inputs, loop.outputs, nodes=[loop], opset_imports={"": 18}, name="g")
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    feeds = {"most": np.array(3), "last": np.array(3), "sequence": sequence}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = session.run(None, {**feeds, "first": np.ones(3, np.float32)})
    np.testing.assert_array_equal(found[0], sequence[1:].sum(0) + 1)
    np.testing.assert_array_equal(found[1], sequence[:0:-1])


def test_bodies_within_a_body_read_the_copies() -> None:
    x, held, around = make_value("x"), make_value("own"), make_value("w")
    going = ir.Value(name="going", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))

    def write_branch(name: str) -> ir.Attr:
        node = ir.node("Mul", [x, held], name=f"{name}/product")
        node.outputs[0].name = f"{name}/product"
        return ir.AttrGraph(name, ir.Graph([], node.outputs, nodes=[node], name=name))

    branches = [write_branch(name) for name in ("then_branch", "else_branch")]
    choice = ir.Node("", "If", [going], branches, name="choice")
    choice.outputs[0].name, choice.outputs[0].type = "chosen", x.type
    writer = BodyWriter("scan/body")
    writer.read(x)
    writer.read(going)
    writer.hold(held, around)
    writer.copy([choice])
    writer.show(choice.outputs[0])
    body = writer.finish()
    read = [v for node in body for inner in list_inner(node) for v in inner.inputs]
    assert set(read) == {body.inputs[0], around}
    assert {use.node.name for use in x.uses()} == {"then_branch/product", "else_branch/product"}
