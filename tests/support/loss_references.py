"""Losses in float64 by numpy, as PyTorch defines them, with gradients by central differences.

Nothing of splitonnx and nothing of ONNX Runtime takes part in it.  The network is two layers:
``scores = tanh(x @ w1) @ w2``, with classes last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from splitonnx.losses import Loss

STEP = 1e-6
Arrays = Mapping[str, np.ndarray]


def draw_weights(classes: int = 4) -> dict[str, np.ndarray]:
    """Draw the weights of the two layers."""
    draw = np.random.default_rng(5)
    return {
        "w1": draw.normal(0, 0.6, (3, 5)).astype(np.float32),
        "w2": draw.normal(0, 0.6, (5, classes)).astype(np.float32),
    }


def build_network(classes: int = 4, tokens: bool = False, outputs: int = 1) -> onnx.ModelProto:
    """Build the network with the output ``scores``, and ``scores2`` = ``hidden @ w3`` if wanted."""
    rows: list[str | int] = ["N", "T"] if tokens else ["N"]
    weights = draw_weights(classes)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["product"], name="first"),
        helper.make_node("Tanh", ["product"], ["hidden"], name="tanh"),
        helper.make_node("MatMul", ["hidden", "w2"], ["scores"], name="second"),
    ]
    made = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [*rows, classes])]
    if outputs > 1:
        weights["w3"] = np.random.default_rng(6).normal(0, 0.6, (5, 2)).astype(np.float32)
        nodes.append(helper.make_node("MatMul", ["hidden", "w3"], ["scores2"], name="third"))
        made.append(helper.make_tensor_value_info("scores2", TensorProto.FLOAT, [*rows, 2]))
    graph = helper.make_graph(
        nodes,
        "two layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*rows, 3])],
        made,
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(
        graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)], producer_name="test"
    )


def predict(weights: Arrays, x: np.ndarray, last: str = "w2") -> np.ndarray:
    """Compute the scores, in the type of the weights."""
    scores: np.ndarray = np.tanh(x @ weights["w1"]) @ weights[last]
    return scores


def measure(loss: Loss, scores: np.ndarray, data: Arrays) -> tuple[float, float]:
    """Return a loss, and the sum of the weights of what counted; the classes are last."""
    labels = data[loss.array]
    shares = np.ones(labels.shape)
    if loss.sample_weights is not None:
        weights = data[loss.sample_weights].astype(np.float64)
        shares = shares * weights.reshape(-1, *[1] * (labels.ndim - 1))
    if loss.kind == "cross-entropy":
        terms, shares = _measure_classes(loss, scores, labels, shares)
    elif loss.kind == "mse":
        terms = (scores - labels) ** 2 * shares
    elif loss.kind == "l1":
        terms = np.abs(scores - labels) * shares
    else:
        terms = (np.logaddexp(0, scores) - scores * labels) * shares
    counted = float(shares.sum())
    return (float(terms.sum()) / counted if counted else 0.0), counted


def _measure_classes(
    loss: Loss, scores: np.ndarray, labels: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    classes = scores.shape[-1]
    shifted = scores - scores.max(-1, keepdims=True)
    log_prob = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    weights = np.array(loss.class_weights or [1.0] * classes)
    counts = labels != loss.ignore_index if loss.ignore_index is not None else labels == labels
    target = np.eye(classes)[np.where(counts, labels, 0)]
    soft = (1 - loss.label_smoothing) * target + loss.label_smoothing / classes
    terms = -(soft * weights * log_prob).sum(-1)
    return terms * counts * shares, (target * weights).sum(-1) * counts * shares


def differentiate(value: Callable[[Arrays], float], weights: Arrays) -> dict[str, np.ndarray]:
    """Return the gradient of a function of weights by central differences in float64."""
    exact = {name: array.astype(np.float64) for name, array in weights.items()}
    gradients = {}
    for name, array in exact.items():
        gradient = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            ends = []
            for step in (STEP, -STEP):
                moved = array.copy()
                moved[place] += step
                ends.append(value({**exact, name: moved}))
            gradient[place] = (ends[0] - ends[1]) / (2 * STEP)
        gradients[name] = gradient
    return gradients
