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


def test_the_table_is_in_order() -> None:
    assert list(LOWERINGS) == sorted(LOWERINGS)
