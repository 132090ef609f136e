"""Bodies of Scans: inputs, values around them, copies of nodes, and outputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from splitonnx.partitioner.differentiation.scans.bodies import BodyWriter

FLOAT = ir.DataType.FLOAT


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
