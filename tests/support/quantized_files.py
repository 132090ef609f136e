"""Models that ``onnxruntime.quantization`` quantised, and the float models that it was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.gate.fused_operators import DOMAIN

Form = Literal["dynamic", "channels", "static", "static channels"]
"""How a model is quantised: with ``quantize_dynamic`` or ``quantize_static`` (QOperator form)."""

SHAPES = {
    "perceptron": (6,),
    "convolutions": (3, 8, 8),
    "pools": (3, 8, 8),
    "recurrence": (7, 4),
    "attention": (5, 8),
}
"""The shape of a sample of each model's input ``x``."""
_RESULTS = {"attention": (5, 3)}


def draw(name: str, samples: int = 6, seed: int = 0) -> np.ndarray:
    """Draw inputs for a model."""
    random = np.random.default_rng((seed, samples))
    return random.standard_normal((samples, *SHAPES[name])).astype(np.float32)


def run(model: onnx.ModelProto | bytes, x: np.ndarray) -> np.ndarray:
    """Compute the output of a model with ONNX Runtime's kernels as they are."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return np.asarray(onnxruntime.InferenceSession(content, options).run(None, {"x": x})[0])


def list_kinds(model: onnx.ModelProto) -> set[str]:
    """List the operators of a model."""
    return {node.op_type for node in model.graph.node}


def read_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Read a model's initializers."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@cache
def build_float(name: str, opset: int = 17) -> onnx.ModelProto:
    """Build a float model with the parameters that a network has."""
    nodes, shapes = _LAYERS[name]
    random = np.random.default_rng(1)
    weights = {n: (random.standard_normal(s) * 0.4).astype(np.float32) for n, s in shapes.items()}
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPES[name]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *_RESULTS.get(name, (3,))])],
        [numpy_helper.from_array(a, n) for n, a in {**weights, **_SETTINGS.get(name, {})}.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


@cache
def quantize(name: str, form: Form, opset: int = 17) -> onnx.ModelProto:
    """Quantise a float model with ONNX Runtime's tool."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            batches = [{"x": draw(name, seed=seed)} for seed in range(3)]
            self._batches: Iterator[Mapping[str, np.ndarray]] = iter(batches)

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self._batches, None)

    with TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "quantised.onnx")
        onnx.save(build_float(name, opset), source)
        channels = form.endswith("channels")
        if form.startswith("static"):
            quantize_static(
                source,
                target,
                Reader(),
                quant_format=QuantFormat.QOperator,
                per_channel=channels,
                reduce_range=True,  # so that no kernel saturates, whatever the processor
            )
        else:
            unsigned = name == "convolutions"  # ConvInteger has no kernel for signed weights
            kind = QuantType.QUInt8 if unsigned else QuantType.QInt8
            quantize_dynamic(
                source, target, weight_type=kind, per_channel=channels, reduce_range=True
            )
        return onnx.load(target)


def _node(kind: str, inputs: str, out: str, **attributes: Any) -> onnx.NodeProto:
    names = [name.strip("-") for name in inputs.split()]
    return helper.make_node(kind, names, out.split(), name=f"{out.split()[-1]}_node", **attributes)


_POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
_LAYERS: Mapping[str, tuple[list[onnx.NodeProto], dict[str, tuple[int, ...]]]] = {
    "perceptron": (
        [
            _node("MatMul", "x W1", "a"),
            _node("Add", "a b1", "h"),
            _node("Relu", "h", "r"),
            _node("MatMul", "r W2", "c"),
            _node("Add", "c b2", "y"),
        ],
        {"W1": (6, 8), "b1": (8,), "W2": (8, 3), "b2": (3,)},
    ),
    "convolutions": (
        [
            _node("Conv", "x K1 c1", "a", pads=[1, 1, 1, 1]),
            _node("Relu", "a", "r"),
            _node("MaxPool", "r", "p", **_POOL),
            _node("Conv", "p K2 c2", "d", pads=[1, 1, 1, 1]),
            _node("Add", "d p", "s"),
            _node("Sigmoid", "s", "sg"),
            _node("GlobalAveragePool", "sg", "g"),
            _node("Flatten", "g", "f"),
            _node("Gemm", "f W b", "y", transB=1),
        ],
        {"K1": (4, 3, 3, 3), "c1": (4,), "K2": (4, 4, 3, 3), "c2": (4,), "W": (3, 4), "b": (3,)},
    ),
    "pools": (
        [
            _node("Conv", "x K1 c1", "a", pads=[1, 1, 1, 1]),
            _node("LeakyRelu", "a", "l", alpha=0.2),
            _node("AveragePool", "l", "p", **_POOL),
            _node("Split", "p sizes", "s0 s1", axis=1),
            _node("Mul", "s0 s1", "m"),
            _node("Concat", "m s1", "j", axis=1),
            _node("Pad", "j ends", "d"),
            _node("Resize", "d - factors", "z", mode="nearest"),
            _node("GlobalAveragePool", "z", "g"),
            _node("Reshape", "g shape", "f"),
            _node("MatMul", "f W", "e"),
            _node("Softmax", "e", "y", axis=-1),
        ],
        {"K1": (4, 3, 3, 3), "c1": (4,), "W": (4, 3)},
    ),
    "recurrence": (
        [
            _node("Transpose", "x", "t", perm=[1, 0, 2]),
            _node("LSTM", "t U R B", "- last", hidden_size=5, direction="bidirectional"),
            _node("Transpose", "last", "u", perm=[1, 0, 2]),
            _node("Flatten", "u", "f"),
            _node("MatMul", "f W", "y"),
        ],
        {"U": (2, 20, 4), "R": (2, 20, 5), "B": (2, 40), "W": (10, 3)},
    ),
    "attention": (
        [
            _node("Attention", "x Q q", "a", domain=DOMAIN, num_heads=2),
            _node("MatMul", "a W", "y"),
        ],
        {"Q": (8, 24), "q": (24,), "W": (8, 3)},
    ),
}
_SETTINGS: Mapping[str, Mapping[str, np.ndarray]] = {
    "pools": {
        "sizes": np.array([2, 2], np.int64),
        "ends": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "factors": np.array([1, 1, 2, 2], np.float32),
        "shape": np.array([0, 4], np.int64),
    }
}
