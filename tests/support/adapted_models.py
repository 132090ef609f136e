"""What tests of adapters share: trained adapters, and what a model computes and holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator


def fill(content: bytes, seed: int = 3) -> bytes:
    """Give every B numbers, as training would."""
    random, model = np.random.default_rng(seed), onnx.ModelProto.FromString(content)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".lora_B"):
            old = numpy_helper.to_array(tensor)
            new = random.standard_normal(old.shape).astype(old.dtype)
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    filled: bytes = model.SerializeToString()
    return filled


def run(model: bytes | onnx.ModelProto, data: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute a model's first output with onnx's reference evaluator."""
    proto = onnx.ModelProto.FromString(model) if isinstance(model, bytes) else model
    feeds = {value.name: data[value.name] for value in proto.graph.input}
    found, *_ = ReferenceEvaluator(proto).run(None, feeds)
    return np.asarray(found)


def describe(model: bytes | onnx.ModelProto) -> list[tuple[str, str, list[str], list[str]]]:
    """List the nodes of a model, each with its name, operator, inputs and outputs."""
    proto = onnx.ModelProto.FromString(model) if isinstance(model, bytes) else model
    return [(n.name, n.op_type, [*n.input], [*n.output]) for n in proto.graph.node]


def read_weights(content: bytes) -> dict[str, np.ndarray]:
    """Return the initializers of a model by name."""
    stored = onnx.ModelProto.FromString(content).graph.initializer
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in stored}
