"""Weights stored as integers and multiplied by a scale: made floats, or told of."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import splitonnx
from splitonnx.errors import UsageError
from splitonnx.partitioner.normalization.dequantized.replacements import dequantize
from splitonnx.partitioner.normalization.dequantized.stored import find_stored_integers
from splitonnx.partitioner.reports.checks import check
from splitonnx.runtime.client.clients import Client

X = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)


def build(*, zero: bool = False) -> onnx.ModelProto:
    """Build two layers with 8-bit weights, one scale for each column or for all of them."""
    random = np.random.default_rng(0)
    arrays = {
        "w1_q": random.integers(-128, 128, (4, 5), np.int8),
        "s1": random.uniform(0.005, 0.01, (1, 5)).astype(np.float32),
        "w2_q": random.integers(0, 256, (5, 3), np.uint8),
        "s2": np.array([0.01], np.float32),
        "z2": np.array([127 if zero else 0], np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["w1_q"], ["w1_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["w1_f", "s1"], ["w1"]),
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Cast", ["w2_q"], ["w2_f"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["w2_f", "z2"], ["w2_c"]),
        helper.make_node("Mul", ["s2", "w2_c"], ["w2"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def run(model: onnx.ModelProto) -> np.ndarray:
    (made,) = ReferenceEvaluator(model).run(None, {"x": X})
    return np.asarray(made)


@pytest.mark.parametrize("zero", [False, True])
def test_the_float_weights_have_their_own_names_and_the_model_its_results(zero: bool) -> None:
    given = build(zero=zero)
    model = ir.from_proto(given)
    told = dequantize(model).describe()
    made = ir.to_proto(model)
    assert [node.op_type for node in made.graph.node] == ["MatMul", "Relu", "MatMul"]
    assert {tensor.name for tensor in made.graph.initializer} == {"w1", "w2"}
    np.testing.assert_array_equal(run(made), run(given))
    assert "turned 2 Mul into" in told
    assert "'w1', 'w2'; they stay floats in the merged model" in told


@pytest.mark.parametrize("kind", ["FLOAT8E4M3FN", "FLOAT8E5M2"])
def test_floats_of_8_bits_are_scaled_alike(kind: str) -> None:
    given = build()
    (stored,) = [tensor for tensor in given.graph.initializer if tensor.name == "w1_q"]
    values = np.linspace(-200, 200, 20).tolist()
    number = TensorProto.DataType.Value(kind)
    stored.CopyFrom(helper.make_tensor("w1_q", number, (4, 5), values))
    given.opset_import[0].version = 19
    assert find_stored_integers(ir.from_proto(given).graph) == {"w1_q": 20, "w2_q": 15}
    model = ir.from_proto(given)
    dequantize(model)
    made = ir.to_proto(model)
    assert {tensor.name for tensor in made.graph.initializer} == {"w1", "w2"}
    np.testing.assert_array_equal(run(made), run(given))


def test_a_scale_that_would_widen_the_integers_is_left() -> None:
    given = build()
    given.graph.initializer[3].CopyFrom(numpy_helper.from_array(np.ones((2, 5, 3), "f4"), "s2"))
    model = ir.from_proto(given)
    assert dequantize(model).weights == ("w1",)


@pytest.mark.parametrize("scales", [1, 3])
def test_rows_are_read_from_a_float_table_if_numbers_scale_it(scales: int) -> None:
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [
            numpy_helper.from_array(random.integers(-9, 9, (7, 3), np.int8), "table"),
            numpy_helper.from_array(np.linspace(0.5, 1, scales, dtype="f4"), "scale"),
        ],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17)]
    given = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    model = ir.from_proto(given)
    assert find_stored_integers(model.graph) == {"table": 21}
    assert dequantize(model).weights == ("table#float",)
    made, ids = ir.to_proto(model), {"ids": np.array([6, 0, 3])}
    assert made.graph.node[0].op_type == "Gather"
    (expected,), (actual,) = (ReferenceEvaluator(one).run(None, ids) for one in (given, made))
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def build_scaled_rows(form: str, ids: str = "ids") -> onnx.ModelProto:
    """Build rows of a table, each of which a number of its own scales: in one of two forms.

    ``ids`` names the indices with which the scales are read.
    """
    random = np.random.default_rng(0)
    scales = random.uniform(0.01, 0.1, (7, 1) if form == "matrix" else 7).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["scales", ids], ["picked"]),
        helper.make_node("Unsqueeze", ["picked", "last"], ["column"]),
        helper.make_node("Mul", ["column" if form == "vector" else "picked", "floats"], ["y"]),
    ]
    if form == "matrix":
        del nodes[3]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["N", 2]) for n in ("ids", "others")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2, 3])],
        [
            numpy_helper.from_array(random.integers(-9, 9, (7, 3), np.int8), "table"),
            numpy_helper.from_array(scales, "scales"),
            numpy_helper.from_array(np.array([-1]), "last"),
        ],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("form", ["vector", "matrix"])
def test_rows_with_a_scale_each_are_read_from_a_float_table(form: str) -> None:
    given = build_scaled_rows(form)
    model = ir.from_proto(given)
    assert dequantize(model).weights == ("table#float",)
    made = ir.to_proto(model)
    assert [node.op_type for node in made.graph.node] == ["Gather"]
    ids = {name: np.array([[6, 0], [3, 3], [1, 5]]) for name in ("ids", "others")}
    (expected,), (actual,) = (ReferenceEvaluator(one).run(None, ids) for one in (given, made))
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


@pytest.mark.parametrize("form", ["vector", "matrix"])
def test_scales_of_other_rows_are_left(form: str) -> None:
    with pytest.raises(UsageError, match="scale stored ones, and this one does not"):
        dequantize(ir.from_proto(build_scaled_rows(form, ids="others")))


def test_the_float_weights_are_trained_split_as_they_are_whole() -> None:
    labels = np.zeros((6, 3), np.float32)
    bundle = splitonnx.cut(build(), at="r", loss="mse", dequantize=True, send_labels=True)
    assert set(bundle.client.weights) == {"w1"}
    found = splitonnx.verify(bundle, {"x": X, "labels": labels}, steps=2, batch_size=3)
    assert found.largest_difference <= 1e-6
    merged = onnx.load_from_string(splitonnx.merge(bundle))
    np.testing.assert_allclose(run(merged), run(build()), rtol=1e-6, atol=1e-6)


def test_integers_that_stay_untrained_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    sentence = "'w1_q', 'w2_q': 35 quantized numbers are not trained; --dequantize"
    (remark,) = [one for one in check(build()).remarks if one.options == ("--dequantize",)]
    assert sentence in remark.sentence
    assert remark.names == ("w1_q", "w2_q")
    with caplog.at_level(logging.WARNING):
        splitonnx.cut(build(), at="r", loss="mse", send_labels=True)
    assert sentence in caplog.text
    floats = ir.from_proto(build())
    dequantize(floats)
    assert find_stored_integers(floats.graph) == {}


def test_integers_that_a_part_of_the_model_computes_with_are_told_of() -> None:
    random = np.random.default_rng(0)
    settings = {"scale": np.float32(0.05), "zero": np.uint8(128)}
    arrays = {
        **settings,
        "W_quantized": random.integers(100, 156, (4, 5), np.uint8),
        "V": random.standard_normal((5, 3)).astype(np.float32),
    }
    given = ["x_q", "scale", "zero", "W_quantized", "scale", "zero", "scale", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x_q"]),
        helper.make_node("QLinearMatMul", given, ["h_q"]),
        helper.make_node("DequantizeLinear", ["h_q", "scale", "zero"], ["h"]),
        helper.make_node("MatMul", ["h", "V"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    (remark,) = [one for one in check(model).remarks if one.options == ("--dequantize",)]
    assert "'W_quantized': 20 quantized numbers are not trained" in remark.sentence
    told = [one.sentence for one in check(model, dequantize=True).remarks]
    assert not [one for one in told if "not trained" in one]


def build_unscaled(*weights: onnx.NodeProto) -> onnx.ModelProto:
    """Build a layer whose weight ``f`` some nodes make of the 8-bit matrix ``q``."""
    arrays = {
        "q": np.random.default_rng(0).integers(-100, 100, (4, 3), np.int8),
        "rows": np.array([3, 1, 0, 2]),
        "zero": np.array(7, np.float32),
        "scale": np.array(0.01, np.float32),
    }
    nodes = [
        *weights,
        helper.make_node("MatMul", ["x", "f"], ["h"]),
        helper.make_node("Mul", ["h", "scale"], ["y"]),
    ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def cast(source: str, result: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], to=TensorProto.FLOAT)


@pytest.mark.parametrize(
    "nodes",
    [
        [cast("q", "f")],
        [cast("q", "c"), helper.make_node("Sub", ["c", "zero"], ["f"])],
        [helper.make_node("Gather", ["q", "rows"], ["g"]), cast("g", "f")],
        [cast("q", "c"), helper.make_node("Gather", ["c", "rows"], ["f"])],
    ],
    ids=["alone", "less a zero point", "rows first", "rows later"],
)
def test_integers_that_are_weights_without_a_scale_are_floats_with_the_option(
    nodes: list[onnx.NodeProto],
) -> None:
    given = build_unscaled(*nodes)
    (remark,) = [one for one in check(given).remarks if one.options == ("--dequantize",)]
    assert "of those that are weights without a scale" in remark.sentence
    bundle = splitonnx.cut(given, at=None, loss="mse", dequantize=True)
    assert set(bundle.client.weights) == {"q#float"}
    labels = np.zeros((6, 3), np.float32)
    with Client(bundle.client, threads=1) as client:
        before = client.state()["q#float"].copy()
        np.testing.assert_allclose(client.predict({"x": X})["y"], run(given), rtol=1e-5)
        client.step({"x": X, "labels": labels}, learning_rate=0.1)
        assert (client.state()["q#float"] != before).all()


def test_integers_that_are_no_weights_are_left() -> None:
    """A mask that is stored in few bytes."""
    mask = [cast("q", "m"), helper.make_node("Add", ["m", "m"], ["n"]),
            helper.make_node("Relu", ["n"], ["f"])]  # fmt: skip
    with pytest.raises(UsageError, match="leave it out"):
        dequantize(ir.from_proto(build_unscaled(*mask)))
