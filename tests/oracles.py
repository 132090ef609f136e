"""An independent oracle for gradients: finite differences in float64 by onnx's own evaluator.

Nothing of splitonnx and nothing of ONNX Runtime takes part in it: the model is evaluated by
onnx.reference, the loss is a line of numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

STEP = 1e-6


def _cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    shifted = scores - scores.max(1, keepdims=True)
    log_prob = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return float(-log_prob[np.arange(len(labels)), labels].mean())


LOSSES: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "cross-entropy": _cross_entropy,
    "mse": lambda output, labels: float(((output - labels) ** 2).mean()),
    "l1": lambda output, labels: float(np.abs(output - labels).mean()),
    "bce-with-logits": lambda output, labels: float(
        (np.logaddexp(0, output) - output * labels).mean()
    ),
}


class Erf(OpRun):
    """Erf in float64; onnx's own evaluator rounds it to float32."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (np.vectorize(math.erf, otypes=[np.float64])(x),)


def to_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a float32 model as a float64 one."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    graph = double.graph
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return double


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        array = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def to_inference(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with BatchNormalization and Dropout as in inference."""
    settled = onnx.ModelProto()
    settled.CopyFrom(model)
    for node in settled.graph.node:
        if node.op_type == "BatchNormalization":
            del node.output[1:]
            kept = [a for a in node.attribute if a.name != "training_mode"]
            del node.attribute[:]
            node.attribute.extend(kept)
        if node.op_type == "Dropout":
            del node.input[1:]
    return settled


def sample_gradients(
    model: onnx.ModelProto,
    loss: str,
    data: Mapping[str, np.ndarray],
    parameters: list[str],
    *,
    entries: int = 8,
) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Yield (parameter, index, derivative of the loss) for some entries of each parameter."""
    double = to_double(model)
    weights = {t.name: numpy_helper.to_array(t).copy() for t in double.graph.initializer}
    for tensor in list(double.graph.initializer):
        if tensor.name in parameters:
            double.graph.initializer.remove(tensor)
            double.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, TensorProto.DOUBLE, tensor.dims)
            )
    evaluator = ReferenceEvaluator(double, new_ops=[Erf])
    feeds = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in data.items()}
    labels = feeds.pop("labels")
    feeds |= {name: weights[name] for name in parameters}

    def measure() -> float:
        outputs = evaluator.run(None, feeds)
        assert isinstance(outputs, list)
        return LOSSES[loss](outputs[0], labels)

    random = np.random.default_rng(0)
    for name in parameters:
        array = feeds[name]
        places = random.permutation(array.size)[:entries]
        for place in places:
            index = tuple(int(i) for i in np.unravel_index(place, array.shape))
            kept = array[index]
            array[index] = kept + STEP
            above = measure()
            array[index] = kept - STEP
            below = measure()
            array[index] = kept
            yield name, index, (above - below) / (2 * STEP)
