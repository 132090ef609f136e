"""Native code behind functions of bytes, here in process."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.native import natives
from splitonnx.partitioner.native.natives import (
    NATIVES,
    StockRuntime,
    check_form,
    decode_arrays,
    encode_arrays,
    infer_node,
    infer_shapes,
    list_types,
)
from splitonnx.partitioner.native.stored_tensors import Stored, separate_weights

FLOAT = TensorProto.FLOAT


def make_model(*nodes: onnx.NodeProto) -> bytes:
    """Write a model from the matrix ``x`` to the matrix ``y``."""
    graph = helper.make_graph(
        list(nodes), "g", [helper.make_tensor_value_info("x", FLOAT, [2, 6])],
        [helper.make_tensor_value_info("y", FLOAT, [None, None])],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def make_type(*dims: int | str) -> bytes:
    content: bytes = helper.make_tensor_type_proto(FLOAT, dims).SerializeToString()
    return content


def read_shape(content: bytes) -> list[int]:
    kind = onnx.TypeProto.FromString(content)
    return [dim.dim_value for dim in kind.tensor_type.shape.dim]


def test_onnxs_checker_refuses_what_contradicts_itself() -> None:
    check_form(make_model(helper.make_node("Relu", ["x"], ["y"])))
    with pytest.raises(onnx.checker.ValidationError, match="Explode"):
        check_form(make_model(helper.make_node("Explode", ["x"], ["y"])))


def test_shapes_are_inferred_for_a_whole_model() -> None:
    node = helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])
    made = onnx.ModelProto.FromString(infer_shapes(make_model(node), True))
    dims = made.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [6, 2]


def test_a_node_is_typed_by_its_inputs_and_by_contents_that_are_known() -> None:
    node = helper.make_node("Reshape", ["i0", "i1"], ["o0"]).SerializeToString()
    shape = numpy_helper.from_array(np.array([3, 4], np.int64), "i1")
    types = {
        "i0": make_type(2, 6),
        "i1": helper.make_tensor_type_proto(TensorProto.INT64, [2]).SerializeToString(),
    }
    made = infer_node(node, types, {"i1": shape.SerializeToString()}, 18)
    assert read_shape(made["o0"]) == [3, 4]
    unknown = onnx.TypeProto.FromString(infer_node(node, types, {}, 18)["o0"])
    assert all(not dim.HasField("dim_value") for dim in unknown.tensor_type.shape.dim)


def test_types_come_as_onnx_runtime_writes_them() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Greater", ["x", "y"], ["mask"]),
        helper.make_node("Shape", ["x"], ["shape"]),
    ]
    model = onnx.ModelProto.FromString(make_model(*nodes))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("mask", "shape"))
    found = list_types(model.SerializeToString())
    assert found == {"y": "tensor(float)", "mask": "tensor(bool)", "shape": "tensor(int64)"}


def test_models_run_in_both_evaluators_on_serialized_tensors() -> None:
    content = make_model(helper.make_node("Relu", ["x"], ["y"]))
    array = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6)
    batch = {"x": numpy_helper.from_array(array).SerializeToString()}
    for made in (
        *(
            natives.run_session(content, [batch, batch], level)
            for level in ("none", "basic", "all")
        ),
        natives.run_reference(content, [batch, batch], 10.0),
    ):
        assert len(made) == 2
        for outputs in made:
            found = numpy_helper.to_array(onnx.TensorProto.FromString(outputs["y"]))
            np.testing.assert_array_equal(found, np.maximum(array, 0))


@pytest.mark.parametrize("level", ["none", "basic", "all", "usual", "reference"])
def test_a_model_whose_weights_are_stored_beside_it_gives_the_same_bits(level: str) -> None:
    """ONNX Runtime may merge the normalization into the weights of the convolution."""
    random = np.random.default_rng(0)
    shapes = {"w": (32, 64, 3, 3), "scale": (32,), "bias": (32,), "mean": (32,), "var": (32,)}
    weights = [
        numpy_helper.from_array(random.random(shape, np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"]),
        helper.make_node("BatchNormalization", ["conv", *list(shapes)[1:]], ["y"]),
    ]
    value = helper.make_tensor_value_info("x", FLOAT, [None, 64, 5, 5])
    graph = helper.make_graph(nodes, "g", [value], [onnx.ValueInfoProto(name="y")], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    batch = encode_arrays({"x": random.standard_normal((2, 64, 5, 5), np.float32)})
    light = separate_weights(model)
    stored = {n: (kind, dims, kept.content) for n, (kind, dims, kept) in light.weights.items()}
    assert list(stored) == ["w"]

    def run(content: bytes, weights: Mapping[str, Stored]) -> bytes:
        if level == "reference":
            (made,) = natives.run_reference(content, [batch], 10.0, weights)
        else:
            (made,) = natives.run_session(content, [batch], level, weights)
        return made["y"]

    assert run(light.content, stored) == run(model.SerializeToString(), {})


def test_arrays_are_the_same_after_encoding_and_decoding() -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(True), "c": np.zeros((0, 2))}
    for name, array in decode_arrays(encode_arrays(arrays)).items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype


def test_an_input_that_is_an_output_comes_back_as_it_was() -> None:
    model = onnx.ModelProto.FromString(make_model(helper.make_node("Relu", ["x"], ["y"])))
    model.graph.output.extend(model.graph.input)
    array = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6)
    batches = [
        {"x": numpy_helper.from_array(array * factor).SerializeToString()} for factor in range(4)
    ]
    for factor, outputs in enumerate(
        natives.run_session(model.SerializeToString(), batches, "none")
    ):
        found = numpy_helper.to_array(onnx.TensorProto.FromString(outputs["x"]))
        np.testing.assert_array_equal(found, array * factor)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_the_reference_evaluator_is_stopped_after_its_time() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["still"]),
            helper.make_node("Add", ["state", "one"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, []),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["count", "on", "start"], ["end"], body=body)],
        "endless",
        [],
        [helper.make_tensor_value_info("end", TensorProto.FLOAT, [])],
        [
            numpy_helper.from_array(np.array(2**62), "count"),
            numpy_helper.from_array(np.array(True), "on"),
            numpy_helper.from_array(np.array(0, np.float32), "start"),
            numpy_helper.from_array(np.array(1, np.float32), "one"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    gc.disable()  # pytest tells of an error that a callback of Hypothesis for collections gets
    with pytest.raises(TimeoutError):
        natives.run_reference(model.SerializeToString(), [{}], 0.2)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_a_time_limit_holds_though_its_first_error_is_discarded() -> None:
    caught: list[str] = []

    def work() -> None:
        with natives._limit_time(0.01):
            try:
                while True:
                    pass
            except TimeoutError:
                caught.append("discarded")
            while True:
                pass

    with pytest.raises(TimeoutError):
        work()
    assert caught == ["discarded"]


def test_a_stock_runtime_is_told_from_the_training_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(onnxruntime.capi._pybind_state, "GradientGraphBuilder")
    with pytest.raises(StockRuntime, match="GradientGraphBuilder"):
        natives.build_gradients(b"", ["w"], "loss")


def test_every_native_is_its_name_and_says_whose_code_it_is() -> None:
    assert list(NATIVES) == sorted(NATIVES)
    for name, (function, owner) in NATIVES.items():
        assert function.__name__ == name
        assert owner
