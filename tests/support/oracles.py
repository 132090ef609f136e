"""An independent oracle for gradients: finite differences in float64 by onnx's own evaluator.

Nothing of splitonnx and nothing of ONNX Runtime takes part in it: the model is evaluated by
onnx.reference, the loss is a line of numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_grid_sample

from tests.support.doubles import DOUBLES
from tests.support.pools import replace_pools

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
        return (np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype),)


class Gelu(OpRun):
    """Gelu in float64; onnx's own evaluator expands it, its Erf included."""

    op_domain = ""

    def _run(self, x: np.ndarray, approximate: str = "none") -> tuple[np.ndarray]:
        if approximate == "tanh":
            return (x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),)
        return (x / 2 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / np.sqrt(2))),)


class GridSample(op_grid_sample.GridSample):
    """GridSample with places in float64; onnx's own evaluator rounds them to float32."""

    op_domain = ""

    def _gs_denormalize_coordinates(
        self, n: np.ndarray, dims: tuple[int, ...], align_corners: bool
    ) -> np.ndarray:
        places = zip(n, dims, strict=False)
        return np.array([self._gs_denormalize(v, dim, align_corners) for v, dim in places])

    @classmethod
    def eval(cls, *arrays: Any, **attributes: Any) -> Any:
        """Evaluate it for DeformConv, which samples the same places anew for each channel."""
        key = (*((a.tobytes(), a.dtype.str, a.shape) for a in arrays), *sorted(attributes.items()))
        if key not in _SAMPLED:
            _SAMPLED[key] = super().eval(*arrays, **attributes)
        return _SAMPLED[key]


_SAMPLED: dict[tuple[tuple[Any, ...], ...], Any] = {}
"""What was sampled, by the content of the arrays and the attributes."""

# DeformConv of onnx's own evaluator takes its class by this name
op_grid_sample.GridSample = GridSample  # type: ignore[misc]


replace_pools()

_NARROW = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def to_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with every float as float64."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    _widen_graph(double.graph)
    return double


def _widen_graph(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and not node.attribute:  # zeros in float32
            zero = numpy_helper.from_array(np.zeros(1))
            node.attribute.append(helper.make_attribute("value", zero))
        if node.op_type == "GroupNormalization":  # its statistics are in float32 unless it says so
            kept = [attribute for attribute in node.attribute if attribute.name != "stash_type"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("stash_type", TensorProto.DOUBLE)])
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
            if attribute.HasField("g"):
                _widen_graph(attribute.g)
            if attribute.name in ("to", "dtype", "stash_type") and attribute.i in _NARROW:
                attribute.i = TensorProto.DOUBLE
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _NARROW:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in _NARROW:
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
    evaluator = make_evaluator(double)
    feeds = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in data.items()}
    labels = feeds.pop("labels")
    feeds |= {name: weights[name] for name in parameters}

    def measure() -> float:
        outputs = evaluator.run(None, feeds)
        assert isinstance(outputs, list)
        return LOSSES[loss](outputs[0], labels)

    for name in parameters:
        for index, slope in differentiate_numerically(measure, feeds[name], entries=entries):
            yield name, index, slope


def differentiate_numerically(
    measure: Callable[[], float], array: np.ndarray, *, entries: int, step: float = STEP
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield (index, derivative of ``measure``) for some entries of a float64 ``array``.

    ``array`` is changed in place for each, and restored.
    """
    places = np.random.default_rng(0).permutation(array.size)[:entries]
    for place in places:
        index = tuple(int(i) for i in np.unravel_index(place, array.shape))
        kept = array[index]
        array[index] = kept + step
        above = measure()
        array[index] = kept - step
        below = measure()
        array[index] = kept
        yield index, (above - below) / (2 * step)


def make_evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """Make onnx's own evaluator, with the operators that it would round done in float64."""
    return ReferenceEvaluator(model, new_ops=[Erf, Gelu, GridSample, *DOUBLES])
