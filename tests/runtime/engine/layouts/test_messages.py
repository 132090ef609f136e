"""Messages as they are written, read by the onnx package."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from splitonnx.runtime.engine.layouts.messages import (
    write_attribute,
    write_constant,
    write_field,
    write_integer,
    write_model,
    write_node,
    write_opset,
    write_value,
)


def test_a_node_is_read_as_it_was_meant() -> None:
    attributes = [write_attribute("axis", 2), write_attribute("perm", [0, 300, 1])]
    written = write_node("Op", ["a", ""], "", "y", name="n", domain="d", attributes=attributes)
    node = onnx.NodeProto.FromString(written)
    expected = helper.make_node(
        "Op", ["a", ""], ["", "y"], "n", domain="d", axis=2, perm=[0, 300, 1]
    )
    assert list(node.input) == ["a", ""]
    assert (node.op_type, node.name, node.domain) == ("Op", "n", "d")
    assert list(node.output) == ["", "y"]
    assert sorted(node.attribute, key=lambda a: a.name) == list(expected.attribute)


@pytest.mark.parametrize("numbers", [[], [1], [2**40, -1, 0]])
def test_a_constant_holds_its_numbers(numbers: list[int]) -> None:
    tensor = onnx.TensorProto.FromString(write_constant("c", numbers))
    assert tensor.name == "c"
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), np.array(numbers, np.int64))


def test_a_value_has_its_shape() -> None:
    value = onnx.ValueInfoProto.FromString(write_value("x", (1, 200, 3)))
    assert value == helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 200, 3))


def test_a_value_may_have_any_shape() -> None:
    value = onnx.ValueInfoProto.FromString(write_value("x", None))
    assert value == helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)


def test_an_opset_has_its_version() -> None:
    assert onnx.OperatorSetIdProto.FromString(write_opset("d", 17)) == helper.make_opsetid("d", 17)


def test_a_long_field_has_its_length_in_several_bytes() -> None:
    model = onnx.ModelProto.FromString(write_integer(1, 8) + write_field(6, "t" * 20_000))
    assert (model.ir_version, len(model.doc_string)) == (8, 20_000)


def test_a_model_has_its_version_its_operator_sets_and_its_graph_s_fields() -> None:
    value = write_value("x", (1,))
    fields = [("name", b"g"), ("input", value), ("output", value)]
    model = onnx.ModelProto.FromString(write_model(8, [write_opset("", 17)], fields))
    assert (model.ir_version, model.graph.name) == (8, "g")
    assert [entry.version for entry in model.opset_import] == [17]
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["x", "x"]
