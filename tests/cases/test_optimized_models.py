"""Models that ONNX Runtime's optimizers wrote."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import UnsupportedModel
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.fused_models import draw, run_stock
from tests.support.nets import Net
from tests.support.small_models import (
    evaluate,
    hold_predictions,
    hold_step,
    load_data,
    load_model,
)

NAME = "33_simplified_layernorm"
WEIGHTS = ["w0", "w1", "b1", "w2", "b2", "gain", "shift", "w3"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_simplified_layer_norm_trains_split_as_unsplit(target: Target) -> None:
    model, data, meant = load_model(NAME), load_data(NAME), _write_by_hand(load_model(NAME))
    (stock,) = run_stock(model, {"x": data["x"]})
    np.testing.assert_allclose(stock, evaluate(meant, data)["y"], rtol=1e-4, atol=1e-5)
    bundle = cut(model, at="n", client_target=target, server_target=target)
    hold_predictions(bundle, meant, data)
    assert verify(bundle, data, batch_size=8).ok
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_step(whole, meant, load_data(NAME, 4), ["w1", "b1", "ln", "w2", "b2"])


@pytest.mark.parametrize(("target", "opset"), [("training", 13), ("portable", 17)])
def test_what_the_optimizer_writes_trains_as_what_it_read(
    tmp_path: Path, target: Target, opset: int
) -> None:
    model = _build(opset)
    optimized = _optimize(model, tmp_path)
    kinds = {node.op_type for node in optimized.graph.node if node.domain == "com.microsoft"}
    assert kinds >= {"BiasGelu", "FusedConv", "SkipLayerNormalization"}
    data = {"x": draw(3, 2, 5, 5), "labels": draw(3, 2, seed=1)}
    bundle = cut(optimized, at="mixed", loss="mse", client_target=target, server_target=target)
    hold_predictions(bundle, model, data)
    assert verify(bundle, data, batch_size=3).ok
    whole = cut(optimized, at=None, loss="mse", client_target=target, server_target=target)
    hold_step(whole, model, data, WEIGHTS, loss="mse")


@pytest.mark.parametrize(
    ("kind", "domain"),
    [("GroupQueryAttention", "com.microsoft"), ("Conv", "com.microsoft.nchwc")],
)
def test_others_are_refused_by_name(kind: str, domain: str) -> None:
    model = load_model(NAME)
    model.graph.node[1].op_type, model.graph.node[1].domain = kind, domain
    model.graph.node[1].name = "fused"
    model.opset_import.append(helper.make_opsetid(domain, 1))
    with pytest.raises(
        UnsupportedModel, match=rf"'fused' \({kind}\).*optimized model; export .* without the opt"
    ):
        cut(model, at=None)


def _write_by_hand(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace the layer norm by ``a / sqrt(mean(a^2) + 1e-6) * ln``."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e-6, np.float32), "epsilon"))
    written = [
        helper.make_node("Mul", ["a", "a"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["mean"], axes=[-1]),
        helper.make_node("Add", ["mean", "epsilon"], ["raised"]),
        helper.make_node("Sqrt", ["raised"], ["root"]),
        helper.make_node("Div", ["a", "root"], ["normal"]),
        helper.make_node("Mul", ["normal", "ln"], ["n"]),
    ]
    first, _, last = model.graph.node
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in (first, *written, last)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _build(opset: int) -> onnx.ModelProto:
    """Build a convolution, a block of a transformer with a residual, and a linear layer."""
    net = Net(opset)
    net.op("Conv", "x", net.constant("w0", draw(4, 2, 3, 3)), out="c", pads=[1, 1, 1, 1])
    net.op("Relu", "c", out="r")
    net.op("Reshape", "r", net.constant("rows", np.array([0, 4, 25])), out="long")
    net.op("Transpose", "long", out="t", perm=[0, 2, 1])
    net.op("MatMul", "t", net.constant("w1", draw(4, 8)), out="m1")
    net.op("Add", "m1", net.constant("b1", draw(8)), out="a1")
    net.op("Div", "a1", net.constant("root2", np.array(math.sqrt(2), np.float32)), out="d1")
    net.op("Erf", "d1", out="e1")
    net.op("Add", "e1", net.constant("one", np.array(1, np.float32)), out="p1")
    net.op("Mul", "a1", "p1", out="g0")
    net.op("Mul", "g0", net.constant("half", np.array(0.5, np.float32)), out="g1")
    net.op("MatMul", "g1", net.constant("w2", draw(8, 4)), out="m2")
    net.op("Add", "m2", net.constant("b2", draw(4)), out="a2")
    net.op("Add", "a2", "t", out="sum")
    net.op("ReduceMean", "sum", out="mean", axes=[-1])
    net.op("Sub", "sum", "mean", out="centred")
    net.op("Pow", "centred", net.constant("two", np.array(2, np.float32)), out="square")
    net.op("ReduceMean", "square", out="variance", axes=[-1])
    net.op("Add", "variance", net.constant("eps", np.array(1e-5, np.float32)), out="raised")
    net.op("Sqrt", "raised", out="root")
    net.op("Div", "centred", "root", out="normal")
    net.op("Mul", "normal", net.constant("gain", 1 + draw(4) / 4), out="scaled")
    net.op("Add", "scaled", net.constant("shift", draw(4, seed=1)), out="shifted")
    net.op("Flatten", "shifted", out="mixed")
    net.op("MatMul", "mixed", net.constant("w3", draw(100, 2) / 10), out="y")
    graph = helper.make_graph(
        net.nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _optimize(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    return onnx.load(folder / "optimized.onnx")
