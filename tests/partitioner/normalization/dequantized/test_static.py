"""Models in QOperator form, against ONNX Runtime's integer kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx.errors import UnsupportedModel
from tests.partitioner.normalization.dequantized.test_dynamic import close, turn
from tests.support.quantized_files import Form, build_float, draw, list_kinds, quantize, run

DOMAIN = "com.microsoft"
SETTINGS = {
    f"{name}_{kind}": value
    for name, (scale, zero) in {"a": (0.02, 128), "b": (0.03, 100), "c": (0.05, 90)}.items()
    for kind, value in (
        ("scale", np.array(scale, np.float32)),
        ("zero", np.array(zero, np.uint8)),
    )
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("perceptron", "static"),
        ("convolutions", "static"),
        ("convolutions", "static channels"),
        ("pools", "static"),
    ],
)
def test_it_computes_what_the_integers_compute(name: str, form: Form) -> None:
    model, x = quantize(name, form), 2 * draw(name)  # some of it outside the range
    turned = turn(model)
    assert not {kind for kind in list_kinds(turned) if kind.startswith(("QLinear", "QGemm"))}
    expected = run(model, x)
    step = min(np.diff(np.unique(expected)))  # sums in another order may round to the next integer
    assert np.abs(run(turned, x) - expected).max() <= 1.01 * step
    assert np.mean(np.abs(run(turned, x) - expected) > step / 2) < 0.05


@pytest.mark.filterwarnings("ignore")
def test_a_fused_relu_still_ends_at_zero() -> None:
    model, x = quantize("perceptron", "static"), draw("perceptron")
    assert "Relu" not in list_kinds(model)
    turned = turn(model)
    turned.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, None))
    hidden = run(cut_off(turned, "h"), x)
    assert hidden.min() == 0
    floats = build_float("perceptron")
    expected = run(cut_off(floats, "r"), x)
    np.testing.assert_allclose(hidden, expected, atol=0.1)


def cut_off(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """Return a model whose only output is ``output``."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    del copied.graph.output[:]
    copied.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    return copied


def hold(kind: str, inputs: list[str], *, is_pair: bool = False, **attributes: Any) -> None:
    """Hold one operator between a QuantizeLinear and a DequantizeLinear against its kernel."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "a_scale", "a_zero"], ["p"]),
        helper.make_node("QuantizeLinear", ["x", "b_scale", "b_zero"], ["q"]),
        helper.make_node(kind, inputs, ["r"], domain=DOMAIN, name="node", **attributes),
        helper.make_node("DequantizeLinear", ["r", "c_scale", "c_zero"], ["y"]),
    ]
    if not is_pair:
        del nodes[1]
    model, x = (
        close(nodes, {**SETTINGS, "test": np.array([True, False] * 3)}, 6),
        draw("perceptron"),
    )
    turned = turn(model)
    assert kind not in list_kinds(turned)
    np.testing.assert_allclose(run(turned, x), run(model, x), atol=1e-6)


A, B, C = (["p", "a_scale", "a_zero"], ["q", "b_scale", "b_zero"], ["c_scale", "c_zero"])


@pytest.mark.parametrize("kind", ["QLinearAdd", "QLinearMul"])
def test_pairs_compute_what_the_kernel_computes(kind: str) -> None:
    hold(kind, [*A, *B, *C], is_pair=True)


def test_a_choice_computes_what_the_kernel_computes() -> None:
    hold("QLinearWhere", ["test", *A, *B, *C], is_pair=True)


def test_a_junction_computes_what_the_kernel_computes() -> None:
    hold("QLinearConcat", [*C, *A, *B], is_pair=True, axis=1)


def test_activations_compute_what_the_kernel_computes() -> None:
    hold("QLinearSigmoid", [*A, *C])
    hold("QLinearLeakyRelu", [*A, *C], alpha=0.3)
    hold("QLinearSoftmax", [*A, *C], axis=-1, opset=13)


def test_a_softmax_of_another_opset_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"'node' \(QLinearSoftmax\).*opset 11 over axis 0"):
        hold("QLinearSoftmax", [*A, *C], axis=0, opset=11)


def test_channels_on_the_last_axis_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="channels on the last axis"):
        hold("QLinearGlobalAveragePool", [*A, *C], channels_last=1)


def test_a_pad_fills_with_what_its_integer_stands_for() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "b_scale", "b_zero"], ["q"]),
        helper.make_node("Pad", ["q", "ends"], ["r"]),  # with the integer 0, which is -3.0
        helper.make_node("DequantizeLinear", ["r", "b_scale", "b_zero"], ["y"]),
    ]
    model, x = close(nodes, {**SETTINGS, "ends": np.array([0, 1, 0, 2])}, 6), draw("perceptron")
    expected = run(model, x)
    np.testing.assert_allclose(expected[:, [0, 7, 8]], -3)
    np.testing.assert_allclose(run(turn(model), x), expected, atol=1e-6)


def test_scales_of_the_rows_of_an_activation_are_refused() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "a_scale", "a_zero"], ["p"]),
        helper.make_node(
            "QLinearMatMul",
            ["p", "rows", "zeros", "w", "b_scale", "b_zero", "c_scale", "c_zero"],
            ["r"],
            name="node",
        ),
        helper.make_node("DequantizeLinear", ["r", "c_scale", "c_zero"], ["y"]),
    ]
    weights = {
        **SETTINGS,
        "rows": np.full(6, 0.02, np.float32),
        "zeros": np.full(6, 128, np.uint8),
        "w": np.ones((6, 6), np.uint8),
    }
    with pytest.raises(UnsupportedModel, match="'rows' is not one scale for a whole activation"):
        turn(close(nodes, weights, 6))
