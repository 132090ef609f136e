"""Types, shapes and attributes that do not fit their operators."""

from __future__ import annotations

import math

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.support.hostile.entries import (
    hostile,
    put_behind,
)
from tests.support.zoo import FLOAT


@hostile("linear0")
def wrong_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.INT32


@hostile("no known data type")
def unknown_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = 999


@hostile("'x' has no known data type")
def unknown_input_type(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = -5


@hostile("sequence_type")
def sequence_input(model: ModelProto) -> None:
    inner = helper.make_tensor_type_proto(FLOAT, ["N", 6])
    model.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(inner))


@hostile("map_type")
def map_input(model: ModelProto) -> None:
    inner = helper.make_tensor_type_proto(FLOAT, ["N", 6])
    model.graph.input[0].type.CopyFrom(helper.make_map_type_proto(TensorProto.INT64, inner))


@hostile("optional_type")
def optional_input(model: ModelProto) -> None:
    inner = helper.make_tensor_type_proto(FLOAT, ["N", 6])
    model.graph.input[0].type.CopyFrom(helper.make_optional_type_proto(inner))


@hostile("")
def string_input(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING


@hostile("dimensions")
def huge_rank(model: ModelProto) -> None:
    for _ in range(1000):
        model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=1)


@hostile("'x' has a dimension beyond all memory")
def image_without_end(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**60


@hostile("shape")
def negative_shape(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -1


@hostile("Mismatched attribute type")
def attribute_of_another_type(model: ModelProto) -> None:
    model.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("transB", "yes"))


@hostile("takes no attribute 'speed'")
def unknown_attribute(model: ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("speed", 11))


@hostile("")
def split_that_does_not_add_up(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([5, 9]), "sizes"))
    put_behind(model, helper.make_node("Split", ["act1", "sizes"], ["odd", "rest"], axis=1))


@hostile("ratio")
def dropout_that_drops_nan(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(math.nan, np.float32), "rate"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "on"))
    put_behind(model, helper.make_node("Dropout", ["act1", "rate", "on"], ["odd"]))


@hostile("unknown data type")
def cast_to_nothing(model: ModelProto) -> None:
    put_behind(model, helper.make_node("Cast", ["act1"], ["odd"], to=-3))


@hostile("unknown data type")
def window_of_nothing(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(8), "size"))
    window = helper.make_node("HannWindow", ["size"], ["window"], output_datatype=127)
    put_behind(model, helper.make_node("Mul", ["act1", "window"], ["odd"]))
    model.graph.node.insert(0, window)


@hostile("names an axis that no tensor has")
def axis_at_the_end_of_int64(model: ModelProto) -> None:
    put_behind(
        model, helper.make_node("LayerNormalization", ["act1", "b1"], ["odd"], axis=2**63 - 1)
    )


@hostile("has strides below 1")
def window_that_does_not_move(model: ModelProto) -> None:
    put_behind(model, helper.make_node("MaxPool", ["act1"], ["odd"], kernel_shape=[1], strides=[0]))


@hostile("has no axis 9")
def axis_beyond_the_rank(model: ModelProto) -> None:
    put_behind(model, helper.make_node("LayerNormalization", ["act1", "b1"], ["odd"], axis=9))


@hostile("dimensions")
def convolution_of_a_matrix(model: ModelProto) -> None:
    weight = numpy_helper.from_array(np.ones((4, 7, 3, 3), np.float32), "kernel")
    model.graph.initializer.append(weight)
    put_behind(model, helper.make_node("Conv", ["act1", "kernel"], ["odd"]))


@hostile("")
def window_of_billions(model: ModelProto) -> None:
    put_behind(model, helper.make_node("MaxPool", ["act1"], ["odd"], kernel_shape=[2**31, 2**62]))


@hostile("(Split): onnx's checker broke down over it")
def split_into_fewer_than_it_gives(model: ModelProto) -> None:
    put_behind(model, helper.make_node("Split", ["act1"], ["odd", "b", "c"], axis=1, num_outputs=1))


@hostile("broke down over it (SIG")
def transposition_of_too_few_axes(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2]), "places"))
    put_behind(model, helper.make_node("Unsqueeze", ["act1", "places"], ["deep"]))
    put_behind(model, helper.make_node("Transpose", ["deep"], ["turned"], perm=[0, 1, 3]), 5)
    put_behind(model, helper.make_node("Flatten", ["turned"], ["odd"]), 6)


@hostile("refers to one that no function has")
def attribute_of_a_function_outside_one(model: ModelProto) -> None:
    attribute = model.graph.node[0].attribute[0]
    attribute.ref_attr_name = "transposed"
    attribute.ClearField("i")


@hostile("(LinearAttention) means is not a usable")
def operator_whose_meaning_lacks_its_inputs(model: ModelProto) -> None:
    model.opset_import[0].version = 27
    node = helper.make_node("LinearAttention", ["act1"] * 6, ["odd", "state"])
    for name, value in (("kv_num_heads", 4), ("q_num_heads", 4), ("update_rule", "constant")):
        node.attribute.append(helper.make_attribute(name, value))
    put_behind(model, node)
