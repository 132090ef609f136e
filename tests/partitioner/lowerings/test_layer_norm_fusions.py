"""Formulas that look like a layer normalization are not replaced by one."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.names import Target
from splitonnx.partitioner.lowerings.layer_norm_fusions import separate_layer_norms
from splitonnx.partitioner.partitions import cut
from tests.support.case_trials import TARGETS
from tests.support.nets import FLOAT, Net
from tests.support.small_models import evaluate, hold_predictions, hold_step

X = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
DATA = {"x": X, "labels": X[::-1].copy()}

RIGHT = ["usual", "simplified"]
WRONG = [
    "exponent",
    "base",
    "computed exponent",
    "reversed Sub",
    "reversed Div",
    "several epsilons",
    "other mean",
    "simplified exponent",
]
"""Formulas that ONNX Runtime 1.19 replaces by a layer normalization, but for "other mean"."""
REFUSED = ["gain of one", "simplified gain of one", "Add before two axes"]
"""Formulas for which it makes a node that it then refuses to run."""


def build(kind: str) -> onnx.ModelProto:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 8, 8), out="h")
    axes = net.constant("axes", np.array([-1]))
    if kind == "Add before two axes":
        net.op("Add", "h", net.op("Tanh", "h", out="t"), out="both")
        gain = net.constant("gain", np.linspace(0.5, 2, 40, dtype=np.float32).reshape(5, 8))
        net.op("LayerNormalization", "both", gain, out="y", axis=1)
        return net.finish({"x": (FLOAT, ["N", 5, 8])}, "y", 5, 8)
    squared, divided = "h", "h"
    if "simplified" not in kind:
        other = net.op("Tanh", "h", out="t") if kind == "other mean" else "h"
        net.op("ReduceMean", other, axes, out="mean")
        order = ["mean", "h"] if kind == "reversed Sub" else ["h", "mean"]
        squared = divided = net.op("Sub", *order, out="gap")
    exponent = net.constant("exponent", np.array(4 if "exponent" in kind else 2, np.float32))
    if kind == "computed exponent":
        exponent = net.op("ReduceMax", net.op("Exp", "h", out="e"), out="f", keepdims=0)
        exponent = net.op("Ceil", net.op("Sigmoid", exponent, out="g"), out="one")
        exponent = net.op("Mul", exponent, "exponent", out="four")
    powers = [exponent, squared] if kind == "base" else [squared, exponent]
    net.op("Pow", *powers, out="power")
    net.op("ReduceMean", "power", axes, out="variance")
    epsilon: np.ndarray = np.full(1, 0.3, np.float32)
    if kind == "several epsilons":
        epsilon = np.linspace(0.1, 2, 5, dtype=np.float32).reshape(5, 1)
    net.op("Add", "variance", net.constant("epsilon", epsilon), out="raised")
    net.op("Sqrt", "raised", out="root")
    order = ["root", divided] if kind == "reversed Div" else [divided, "root"]
    net.op("Div", *order, out="normal")
    size = 1 if "gain of one" in kind else 8
    net.op(
        "Mul", "normal", net.constant("gain", np.linspace(1.5, 2, size, dtype="f")), out="scaled"
    )
    net.op("Add", "scaled", net.constant("bias", np.linspace(0, 1, 8, dtype="f")), out="y")
    return net.finish({"x": (FLOAT, ["N", 5, 8])}, "y", 5, 8)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", [*RIGHT, *WRONG, *REFUSED])
def test_predictions_are_those_of_the_formula(kind: str, target: Target) -> None:
    model = build(kind)
    bundle = cut(model, at="h", loss="mse", client_target=target, server_target=target)
    hold_predictions(bundle, model, DATA)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["exponent", "reversed Sub", "several epsilons", "gain of one"])
def test_training_is_that_of_the_formula(kind: str, target: Target) -> None:
    model = build(kind)
    bundle = cut(model, at=None, loss="mse", client_target=target, server_target=target)
    trained = ["w", "bias"] if kind in REFUSED else ["w", "gain", "bias"]  # one number is a setting
    hold_step(bundle, model, DATA, trained, loss="mse")


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "other mean"])
def test_the_fault_of_the_runtime_is_still_there(kind: str) -> None:
    """If this fails, ONNX Runtime is mended, and nothing need be kept apart any more."""
    model = build(kind)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": X})
    expected = evaluate(model, DATA)["y"]
    assert np.abs(found - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize(("kind", "barriers"), [*((k, 0) for k in RIGHT), *((k, 1) for k in WRONG)])
def test_only_formulas_of_other_things_are_kept_apart(kind: str, barriers: int) -> None:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(build(kind)))
    separate_layer_norms(model.graph)
    assert [node.op_type for node in model.graph].count("Sum") == barriers
