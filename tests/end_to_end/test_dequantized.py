"""Quantised models trained with ``--dequantize``, as ONNX Runtime's own tools wrote them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from typer.testing import CliRunner

import splitonnx
from splitonnx.commands import app
from splitonnx.errors import UnsupportedModel
from splitonnx.names import PORTABLE, TRAINING, Target
from splitonnx.optimizers import SGD
from tests.support.case_trials import run_step
from tests.support.derivatives import hold_steps
from tests.support.quantized_files import (
    Form,
    build_float,
    draw,
    list_kinds,
    quantize,
    read_weights,
    run,
)

TARGETS: tuple[Target, ...] = (TRAINING, PORTABLE)
pytestmark = pytest.mark.filterwarnings("ignore")


def draw_data(name: str, samples: int = 8) -> dict[str, np.ndarray]:
    labels = np.random.default_rng(5).standard_normal((samples, 3)).astype(np.float32)
    return {"x": draw(name, samples), "labels": labels}


@pytest.mark.parametrize(
    ("name", "form", "at", "tail_at"),
    [
        ("perceptron", "channels", "r", ()),
        ("convolutions", "dynamic", "p", "f"),
        ("recurrence", "dynamic", "f", ()),
        ("perceptron", "static", "h", ()),
        ("convolutions", "static channels", "p", "g"),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_dequantized_model_trains_split_as_it_does_whole(
    name: str, form: Form, at: str, tail_at: str, target: Target
) -> None:
    bundle = splitonnx.cut(
        quantize(name, form),
        at=at,
        tail_at=tail_at,
        loss="mse",
        dequantize=True,
        send_labels=not tail_at,
        client_target=target,
        server_target=target,
    )
    assert bundle.manifest.recipe.dequantize
    found = splitonnx.verify(bundle, draw_data(name), steps=2, batch_size=4)
    assert found.largest_difference <= 1e-5


@pytest.mark.parametrize("name", ["perceptron", "convolutions", "recurrence"])
def test_gradients_of_float_weights_agree_with_differences_in_float64(name: str) -> None:
    data = draw_data(name)
    bundles = [
        splitonnx.cut(
            quantize(name, "dynamic"), at=None, loss="mse", dequantize=True, client_target=target
        )
        for target in TARGETS
    ]
    merged = onnx.load_from_string(splitonnx.merge(bundles[0]))
    trained = sorted(set(read_weights(build_float(name))))
    assert set(trained) <= set(bundles[0].client.weights)
    steps = [run_step(bundle, data) for bundle in bundles]
    hold_steps(steps, merged, "mse", data, trained)


def write_branches(folder: Path) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Write a model whose branches read an outer tensor, quantise it, and return both."""
    random = np.random.default_rng(3)

    def draw_weight(name: str, *shape: int) -> onnx.TensorProto:
        values = 0.4 * random.standard_normal(shape)
        return onnx.numpy_helper.from_array(values.astype(np.float32), name)

    def branch(name: str) -> onnx.GraphProto:
        product = helper.make_node("MatMul", ["h", name], [f"{name}_out"], name)
        made = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        return helper.make_graph([product], name, [], [made], [draw_weight(name, 8, 4)])

    nodes = [
        helper.make_node("MatMul", ["x", "W1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["h"], "relu"),
        helper.make_node("ReduceSum", ["x"], ["sum"], "sum", keepdims=0),
        helper.make_node("Greater", ["sum", "limit"], ["c"], "choice"),
        helper.make_node(
            "If", ["c"], ["i"], "if", then_branch=branch("T"), else_branch=branch("E")
        ),
        helper.make_node("MatMul", ["i", "W2"], ["y"], "last"),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size])
        for name, size in (("x", 6), ("y", 3))
    )
    limit = onnx.numpy_helper.from_array(np.array(0, np.float32), "limit")
    weights = [draw_weight("W1", 6, 8), draw_weight("W2", 4, 3), limit]
    graph = helper.make_graph(nodes, "branches", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    source, target = folder / "float.onnx", folder / "quantised.onnx"
    onnx.save(model, source)
    quantize_dynamic(
        source,
        target,
        weight_type=QuantType.QInt8,
        reduce_range=True,
        extra_options={"EnableSubgraph": True},
    )
    return model, onnx.load(target)


def test_a_file_whose_branches_read_what_the_tool_wrote_behind_them_is_read(tmp_path: Path) -> None:
    given, model = write_branches(tmp_path)
    order = [node.op_type for node in model.graph.node]
    assert order.index("If") < order.index("Relu")  # which makes what the branches read
    before = model.SerializeToString()
    bundle = splitonnx.cut(
        model, at="i", loss="mse", dequantize=True, send_inputs=["x"], send_labels=True, check=True
    )
    assert model.SerializeToString() == before
    merged, data = splitonnx.merge(bundle), draw_data("perceptron")
    for x in (data["x"], -data["x"]):  # each takes another branch
        expected, found = (
            onnxruntime.InferenceSession(content).run(None, {"x": x})[0]
            for content in (given.SerializeToString(), merged)
        )
        np.testing.assert_allclose(found, expected, atol=0.06)
        assert np.abs(expected).max() > 0.3
    assert splitonnx.verify(bundle, data, steps=2, batch_size=4).largest_difference <= 1e-5


def test_gradients_through_stored_scales_pass_where_numbers_are_inside_the_range() -> None:
    model, data = quantize("perceptron", "static"), draw_data("perceptron")
    bundle = splitonnx.cut(model, at=None, loss="mse", dequantize=True)
    stored, weights = read_weights(model), bundle.client.weights

    def pair(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        scale = stored[f"{name}_scale"].astype(np.float64)
        zero, ends = stored[f"{name}_zero_point"], np.iinfo(stored[f"{name}_zero_point"].dtype)
        steps = np.clip(np.rint(x / scale) + zero, ends.min, ends.max)
        low, high = ((float(end) - float(zero)) * scale for end in (ends.min, ends.max))
        return (steps - zero) * scale, (x >= low) & (x <= high)

    x, _ = pair(data["x"], "x")
    first, b1, second, b2 = (pair(weights[name], name)[0] for name in ("W1", "b1", "W2", "b2"))
    a, a_inside = pair(x @ first, "a")
    h, h_inside = pair(a + b1, "h")
    c, c_inside = pair(h @ second, "c")
    y, y_inside = pair(c + b2, "y")
    slope = 2 * (y - data["labels"]) / y.size * y_inside
    below = (slope * c_inside) @ second.T * h_inside
    expected = {
        "b2": slope.sum(0),
        "W2": h.T @ (slope * c_inside),
        "b1": below.sum(0),
        "W1": x.T @ (below * a_inside),
    }
    found = run_step(bundle, data)
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[f"{name}_grad"], gradient, rtol=1e-4, atol=1e-6)


def test_the_merged_model_has_float_weights_or_pairs() -> None:
    dynamic, static = (
        splitonnx.merge(splitonnx.cut(quantize("perceptron", form), at=None, dequantize=True))
        for form in ("dynamic", "static")
    )
    assert list_kinds(onnx.load_from_string(dynamic)) == {"MatMul", "Add", "Relu"}
    kinds = {"MatMul", "Add", "QuantizeLinear", "DequantizeLinear", "Sum"}
    merged = onnx.load_from_string(static)
    assert list_kinds(merged) <= kinds
    assert read_weights(merged)["W1"].dtype == np.int8
    x = draw("perceptron")
    np.testing.assert_allclose(run(static, x), run(quantize("perceptron", "static"), x), atol=0.02)


def test_cut_says_what_was_turned_and_by_how_much_results_changed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        splitonnx.cut(quantize("perceptron", "dynamic"), at=None, dequantize=True, check=True)
    assert "--dequantize turned 2 MatMulInteger into" in caplog.text
    assert "--dequantize changed the results of the model by up to" in caplog.text


def test_check_says_what_was_turned() -> None:
    found = splitonnx.check(quantize("convolutions", "static"), loss="mse", dequantize=True)
    assert found.trainable
    (remark,) = (remark for remark in found.remarks if remark.kind == "dequantized")
    assert "2 QLinearConv" in remark.sentence
    assert remark.names == ("K1", "c1", "K2", "c2", "W", "b")


@pytest.mark.parametrize(
    ("name", "form", "tool"),
    [
        ("perceptron", "dynamic", "quantize_dynamic"),
        ("convolutions", "dynamic", "quantize_dynamic"),
        ("recurrence", "dynamic", "quantize_dynamic"),
        ("attention", "dynamic", "quantize_dynamic"),
        ("perceptron", "static", "quantize_static with QuantFormat.QOperator"),
    ],
)
def test_without_the_option_the_refusal_names_the_tool_and_the_option(
    name: str, form: Form, tool: str
) -> None:
    with pytest.raises(UnsupportedModel, match=f"{tool} writes.*--dequantize"):
        splitonnx.cut(quantize(name, form), at=None)


def test_every_command_that_reads_a_model_takes_the_option(tmp_path: Path) -> None:
    model, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    onnx.save(quantize("perceptron", "dynamic"), model)
    arrays = draw_data("perceptron")
    np.savez(data, x=arrays["x"], labels=arrays["labels"])

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert not result.exit_code, result.output
        return result.output

    checked = json.loads(call("check", str(model), "--loss", "mse", "--dequantize", "--json"))
    assert not checked["obstacles"]
    cuts = json.loads(call("inspect", str(model), "--dequantize", "--json"))
    assert "r" in [found["tensor"] for found in cuts]
    pairs = json.loads(call("inspect", str(model), "--u-shape", "--dequantize", "--json"))
    assert pairs
    bundle = str(tmp_path / "bundle")
    call("cut", str(model), "--at", "r", "--send-labels", "--loss", "mse", "--dequantize",
         "-o", bundle, "--quiet")  # fmt: skip
    assert splitonnx.Bundle.load(bundle).manifest.recipe.dequantize
    trained = tmp_path / "trained.onnx"
    call("train", str(model), "--data", str(data), "--local", "--loss", "mse", "--dequantize",
         "-o", str(trained), "--quiet")  # fmt: skip
    assert list_kinds(onnx.load(trained)) == {"MatMul", "Add", "Relu"}


def test_the_loss_falls_in_training() -> None:
    data = draw_data("convolutions", 16)
    bundle = splitonnx.cut(
        quantize("convolutions", "static"),
        at=None,
        loss="mse",
        dequantize=True,
        optimizer=SGD(lr=0.2),
    )
    with splitonnx.Client(bundle.client, None, threads=1) as client:
        history = client.fit(data, epochs=8, batch_size=16, save=False, checkpoint_every=None)
    losses = [step.loss for step in history.steps]
    assert losses[-1] < 0.9 * losses[0]


def test_scales_of_channels_are_kept_where_the_opset_of_the_model_has_none() -> None:
    model, x = quantize("convolutions", "static channels", 11), draw("convolutions")
    merged = splitonnx.merge(splitonnx.cut(model, at=None, dequantize=True))
    np.testing.assert_allclose(run(merged, x), run(model, x), atol=0.02)
