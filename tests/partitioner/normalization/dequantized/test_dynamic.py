"""What ``quantize_dynamic`` writes, against its own results and those of the float model."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.normalization.dequantized.replacements import dequantize
from splitonnx.partitioner.normalization.opsets import inline_functions
from tests.support.quantized_files import (
    Form,
    build_float,
    draw,
    list_kinds,
    quantize,
    read_weights,
    run,
)

CASES: list[tuple[str, Form]] = [
    ("perceptron", "dynamic"),
    ("perceptron", "channels"),
    ("convolutions", "dynamic"),
    ("recurrence", "dynamic"),
    ("recurrence", "channels"),
    ("attention", "dynamic"),
    ("attention", "channels"),
]


def turn(model: onnx.ModelProto, *, is_rounding: bool = False) -> onnx.ModelProto:
    """Dequantise a model."""
    copied = ir.from_proto(model)
    inline_functions(copied)
    dequantize(copied, is_rounding=is_rounding)
    return ir.to_proto(copied)


def measure(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, as a share of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "form"), CASES)
def test_its_weights_are_those_of_the_float_model_within_a_step(name: str, form: Form) -> None:
    made = read_weights(turn(quantize(name, form)))
    for weight, array in read_weights(build_float(name)).items():
        step = np.ptp(np.append(array, 0)) / 63  # of 7 bits at least
        found = made[weight] if made[weight].shape == array.shape else made[weight].T  # of a Gemm
        assert np.abs(found - array).max() <= step, weight
        assert found.dtype == np.float32
    others = set(made) - set(read_weights(build_float(name)))
    assert all(other.endswith("_shape") for other in others)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "form"), CASES)
def test_it_computes_what_the_quantised_model_computes_but_for_rounding(
    name: str, form: Form
) -> None:
    model, x = quantize(name, form), draw(name)
    turned = turn(model)
    assert not {kind for kind in list_kinds(turned) if "Integer" in kind or "Quantize" in kind}
    assert measure(run(turned, x), run(model, x)) < 0.04
    assert measure(run(turned, x), run(build_float(name), x)) < 0.04


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "form"), [case for case in CASES if case[0] in ("perceptron", "convolutions")]
)
def test_with_its_rounding_it_computes_the_same(name: str, form: Form) -> None:
    model, x = quantize(name, form), draw(name)
    assert measure(run(turn(model, is_rounding=True), x), run(model, x)) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_what_the_optimizer_makes_of_it_is_turned_as_well(tmp_path: object) -> None:
    path = f"{tmp_path}/optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = path
    onnxruntime.InferenceSession(quantize("perceptron", "channels").SerializeToString(), options)
    model, x = onnx.load(path), draw("perceptron")
    assert "DynamicQuantizeMatMul" in list_kinds(model)
    assert measure(run(turn(model, is_rounding=True), x), run(model, x)) < 1e-5
    assert {"W1", "b1", "W2", "b2"} == set(read_weights(turn(model)))


def test_a_product_with_float_results_is_turned() -> None:
    random = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "w": random.integers(-60, 60, (6, 3)).astype(np.int8),
        "w_scale": random.random(3).astype(np.float32) * 0.01,
        "w_zero": np.zeros(3, np.int8),
        "bias": random.standard_normal(3).astype(np.float32),
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "q_scale", "q_zero"]),
        helper.make_node(
            "MatMulIntegerToFloat",
            ["q", "w", "q_scale", "w_scale", "q_zero", "w_zero", "bias"],
            ["y"],
            domain="com.microsoft",
        ),
    ]
    model = close(nodes, weights, 6)
    x = draw("perceptron")
    expected = x @ (weights["w"] * weights["w_scale"]) + weights["bias"]
    np.testing.assert_allclose(run(turn(model), x), expected, rtol=1e-4, atol=1e-5)
    assert measure(run(turn(model, is_rounding=True), x), run(model, x)) < 1e-5


def close(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], size: int
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
def test_scales_that_opset_10_computes_from_the_range_are_left_out(name: str) -> None:
    model, floats, x = quantize(name, "dynamic", 10), build_float(name, 10), draw(name)
    assert {"ReduceMin", "ReduceMax", "QuantizeLinear"} <= list_kinds(model)
    turned = turn(model)
    assert list_kinds(turned) <= list_kinds(floats) | {"Add", "Reshape", "MatMul"}
    assert set(read_weights(floats)) <= set(read_weights(turned))
    assert measure(run(turned, x), run(floats, x)) < 0.04


@pytest.mark.filterwarnings("ignore")
def test_sums_without_their_scales_are_refused() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(quantize("perceptron", "dynamic"))
    (factor,) = (n for n in model.graph.node if "r_scale" in n.input and n.op_type == "Mul")
    factor.op_type = "Div"
    with pytest.raises(UnsupportedModel, match=r"c_node_quant.*no Cast and Mul.*cannot be dequ"):
        turn(model)


@pytest.mark.filterwarnings("ignore")
def test_sums_with_the_scale_of_another_tensor_are_refused() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(quantize("perceptron", "dynamic"))
    (factor,) = (n for n in model.graph.node if "r_scale" in n.input and n.op_type == "Mul")
    factor.input[list(factor.input).index("r_scale")] = "x_scale"
    with pytest.raises(UnsupportedModel, match="other scales than those of its inputs"):
        turn(model)


def test_tables_of_integers_become_float_tables() -> None:
    random = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "E_quantized": random.integers(0, 255, (8, 3)).astype(np.uint8),
        "E_scale": np.array(0.01, np.float32),
        "E_zero_point": np.array(128, np.uint8),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["E_quantized", "i"], ["e"]),
        helper.make_node("DequantizeLinear", ["e", "E_scale", "E_zero_point"], ["y"]),
    ]
    model = close(nodes, weights, 5)
    x = random.integers(0, 8, (4, 5)).astype(np.float32)
    turned = turn(model)
    assert list_kinds(turned) == {"Cast", "Gather"}
    assert list(read_weights(turned)) == ["E"]
    np.testing.assert_allclose(run(turned, x), run(model, x), rtol=1e-6)


def test_tables_of_embeddings_become_float_tables() -> None:
    random = np.random.default_rng(0)
    names = ("words", "places", "types", "gamma", "beta")
    shapes = ((9, 8), (5, 8), (2, 8), (8,), (8,))
    weights: dict[str, np.ndarray] = {
        name: random.integers(0, 255, shape).astype(np.uint8)
        for name, shape in zip(names, shapes, strict=True)
    }
    weights |= {f"{name}_scale": np.array(0.01, np.float32) for name in names}
    weights |= {f"{name}_zero": np.array(120 + n, np.uint8) for n, name in enumerate(names)}
    inputs = ["i", "s", *names, "", *(f"{n}_scale" for n in names), *(f"{n}_zero" for n in names)]
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32),
        helper.make_node("Sub", ["i", "i"], ["s"]),
        helper.make_node(
            "QEmbedLayerNormalization", inputs, ["y", "mask"], domain="com.microsoft", epsilon=1e-5
        ),
    ]
    model = close(nodes, weights, 5)
    x = random.integers(0, 9, (4, 5)).astype(np.float32)
    turned = turn(model)
    assert "EmbedLayerNormalization" in list_kinds(turned)
    np.testing.assert_allclose(run(turned, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_a_bias_that_older_tools_add_to_the_sums_is_added_to_the_floats() -> None:
    random = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "K_quantized": random.integers(0, 255, (2, 1, 3)).astype(np.uint8),
        "K_scale": np.array([0.01], np.float32),
        "K_zero": np.array(120, np.uint8),
        "bias": np.array([0.7, -0.4], np.float32),
        "shape": np.array([1, 2, 1]),
        "outer": np.array([0, 1, 6]),
    }
    op = helper.make_node
    nodes = [
        op("Reshape", ["x", "outer"], ["image"]),
        op("DynamicQuantizeLinear", ["image"], ["q", "q_scale", "q_zero"]),
        op("ConvInteger", ["q", "K_quantized", "q_zero", "K_zero"], ["sums"], name="conv"),
        op("Mul", ["q_scale", "K_scale"], ["scale"]),
        op("Div", ["bias", "scale"], ["steps"]),
        op("Floor", ["steps"], ["whole"]),
        op("Cast", ["whole"], ["integers"], to=TensorProto.INT32),
        op("Reshape", ["integers", "shape"], ["added"]),
        op("Add", ["sums", "added"], ["total"]),
        op("Cast", ["total"], ["floats"], to=TensorProto.FLOAT),
        op("Mul", ["floats", "scale"], ["y"]),
    ]
    model, x = close(nodes, weights, 6), draw("perceptron")
    turned = turn(model)
    assert list_kinds(turned) == {"Add", "Conv", "Reshape"}
    assert measure(run(turned, x), run(model, x)) < 0.02
    assert measure(run(turn(model, is_rounding=True), x), run(model, x)) < 0.005
