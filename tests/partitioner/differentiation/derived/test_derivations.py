"""Graphs extended by gradients: of a scalar, or passed on from gradients that are given."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from splitonnx.partitioner.differentiation.derived.derivations import add_gradients
from splitonnx.partitioner.inference.shapes import infer_shapes

MODEL = """
<ir_version: 9, opset_import: ["" : 18]>
given (float[2, 3] x, float[3, 3] w, float[2, 3] end_grad) => (float[2, 3] end, float[2, 3] m)
{
    m = MatMul (x, w)
    squared = Mul (m, m)
    end = Identity (squared)
}
"""
RANDOM = np.random.default_rng(2)
X, W, G = (RANDOM.standard_normal(shape).astype("f") for shape in ((2, 3), (3, 3), (2, 3)))


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    found = session.run(None, feeds)
    return dict(zip([v.name for v in session.get_outputs()], map(np.asarray, found), strict=True))


def read(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    infer_shapes(model)
    return model


def test_a_gradient_that_is_given_is_passed_on() -> None:
    joint = add_gradients(read(MODEL), ["x", "w"], ["end"])
    found = run(joint, {"x": X, "w": W, "end_grad": G})
    slope = 2 * (X @ W) * G
    np.testing.assert_allclose(found["x_grad"], slope @ W.T, rtol=1e-5)
    np.testing.assert_allclose(found["w_grad"], X.T @ slope, rtol=1e-5)


def test_a_value_that_a_node_computes_gets_a_gradient_too() -> None:
    joint = add_gradients(read(MODEL), ["m", "x"], ["end"])
    found = run(joint, {"x": X, "w": W, "end_grad": G})
    np.testing.assert_allclose(found["m_grad"], 2 * (X @ W) * G, rtol=1e-5)
    np.testing.assert_allclose(found["x_grad"], found["m_grad"] @ W.T, rtol=1e-5)


def test_a_loss_and_a_given_gradient_are_added_up() -> None:
    text = MODEL.replace("float[2, 3] m)", "float[2, 3] m, float loss)").replace(
        "m = MatMul (x, w)", "m = MatMul (x, w)  loss = ReduceSum <keepdims = 0> (m)"
    )
    found = run(
        add_gradients(read(text), ["w"], ["end"], loss="loss"), {"x": X, "w": W, "end_grad": G}
    )
    np.testing.assert_allclose(found["w_grad"], X.T @ (1 + 2 * (X @ W) * G), rtol=1e-5)
