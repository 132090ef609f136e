"""The table of lowerings: in order, and an operator that it lacks is named."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.lowerings import LOWERINGS, lower


def test_an_operator_without_a_lowering_is_named() -> None:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.node("SomethingGrad", [value], domain="com.microsoft", name="odd")
    node.outputs[0].name = "y"
    graph = ir.Graph(
        [value], node.outputs, nodes=[node], opset_imports={"": 18, "com.microsoft": 1}
    )
    with pytest.raises(UnsupportedModel, match=r"'odd' \(SomethingGrad\)"):
        lower(graph)


def lower_gradient(node: ir.Node) -> None:
    """Lower a node of a gradient that onnxruntime-training named."""
    inputs = [value for value in node.inputs if value is not None]
    node.outputs[0].name = "x_grad"
    opsets = {"": 18, "com.microsoft": 1}
    lower(ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=opsets))


def test_a_gradient_is_refused_by_the_name_of_the_users_node() -> None:
    """Neither the gradient's nodes nor their tensors are in the user's model."""
    sized = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", "C"]))
             for n in ("dy", "x", "w")]  # fmt: skip
    conv = ir.node("ConvGrad", sized, domain="com.microsoft", name="conv_Grad/ConvGrad_0")
    with pytest.raises(UnsupportedModel, match=r"^the gradient of node 'conv' \(ConvGrad\): the "):
        lower_gradient(conv)
    untyped = ir.Value(name="dy", shape=ir.Shape(["N", 2])), ir.Value(name="y")
    gelu = ir.node("GeluGrad", untyped, domain="com.microsoft", name="gelu_Grad/GeluGrad_0")
    with pytest.raises(UnsupportedModel) as refused:
        lower_gradient(gelu)
    assert str(refused.value).startswith(
        "the gradient of node 'gelu' (GeluGrad): the element type of its input is not known"
    )


def test_the_table_is_in_order() -> None:
    assert list(LOWERINGS) == sorted(LOWERINGS)
