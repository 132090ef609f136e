"""The largest integers of a quantized model are found from its inputs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx.partitioner.cutting.conformance.quantized_ranges import find_upper_ends
from tests.support.nets import FLOAT, Net


def build(dtype: type, zero: int) -> onnx.ModelProto:
    net = Net(opset=19)
    scale = net.constant("scale", np.array(0.5, np.float32))
    net.op("QuantizeLinear", "x", scale, net.constant("zero", np.array(zero, dtype)), out="q")
    net.op("DequantizeLinear", "q", "scale", "zero", out="y")
    return net.finish({"x": (FLOAT, ["N", 3])}, "y", 3)


@pytest.mark.parametrize(
    ("dtype", "zero", "end"), [(np.uint8, 0, 127.5), (np.uint8, 200, 27.5), (np.int8, 7, 60.0)]
)
def test_the_end_is_the_largest_number_that_the_integers_represent(
    dtype: type, zero: int, end: float
) -> None:
    assert find_upper_ends(build(dtype, zero)) == {"x": end}


def test_an_input_quantized_later_gets_a_large_number() -> None:
    model = build(np.uint8, 0)
    model.graph.node.insert(0, helper.make_node("Tanh", ["x"], ["t"]))
    model.graph.node[1].input[0] = "t"
    assert find_upper_ends(model) == {"x": 10.0}


def test_integers_that_are_dequantized_are_large_and_others_left_out() -> None:
    model = build(np.uint8, 0)
    model.graph.node[1].input[0] = "x"
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.UINT8, ["N"]))
    assert find_upper_ends(model) == {"x": 255.0}


def test_a_model_of_floats_has_no_ends() -> None:
    net = Net()
    net.op("Tanh", "x", out="y")
    assert find_upper_ends(net.finish({"x": (FLOAT, ["N", 3])}, "y", 3)) == {}
