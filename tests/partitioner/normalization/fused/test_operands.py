"""What formulas know of a node's inputs."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.normalization.fused.operands import (
    NotYet,
    find_dtype,
    find_rank,
    find_size,
    refuse_inputs,
    refuse_outputs,
    take_optional,
)

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def make(kind: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
    value: ir.Value = ir.node(kind, list(inputs), attributes, name="node").outputs[0]
    value.name = "y"
    return value


def test_a_type_is_traced_back_to_where_it_is_known() -> None:
    x, flag = ir.Value(name="x", type=FLOAT), ir.Value(name="flag")
    assert find_dtype(make("Relu", make("Where", flag, x, x))) == ir.DataType.FLOAT
    assert find_dtype(make("Cast", x, to=10)) == ir.DataType.FLOAT16
    for lost in (make("Relu", flag), make("Shape"), None):
        with pytest.raises(NotYet, match="the element type of"):
            find_dtype(lost)


def test_sizes_are_those_declared() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["N", 4]))
    assert (find_rank(x), find_size(x, 1)) == (2, 4)
    with pytest.raises(NotYet, match="dimension 0 of 'x'"):
        find_size(x, 0)
    with pytest.raises(NotYet, match="the rank of 'z'"):
        find_rank(ir.Value(name="z"))


def test_what_a_formula_lacks_is_refused_by_name() -> None:
    x = ir.Value(name="x")
    node = make("Attention", x, None, x).producer()
    assert node is not None
    assert take_optional(node, 1) is take_optional(node, 7) is None
    assert take_optional(node, 2) is x
    refuse_inputs(node, 3)
    with pytest.raises(UnsupportedModel, match=r"'node' \(Attention\): its input 2 \('x'\)"):
        refuse_inputs(node, 1)
    refuse_outputs(node)
    make("Relu", node.outputs[0])
    refuse_outputs(node, 0)
    with pytest.raises(UnsupportedModel, match=r"its output 0 \('y'\)"):
        refuse_outputs(node)
