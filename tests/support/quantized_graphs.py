"""A graph that ONNX Runtime computes differently with its usual settings, on every processor."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

X = np.random.default_rng(10).standard_normal((1, 16)).astype(np.float32)
_SETTINGS = {"a": (0.02, 128), "b": (0.1, 100), "c": (0.0039, 0)}
"""Scale and zero point of each pair of QuantizeLinear and DequantizeLinear."""


def build_quantized() -> bytes:
    """Build Softmax between two pairs, and two pairs one after the other with other scales."""
    nodes = [
        *_pair("x", "once", "a"),
        helper.make_node("Softmax", ["once"], ["exact"], axis=-1),
        *_pair("exact", "shares", "c"),
        *_pair("x", "first", "a"),
        *_pair("first", "rounded", "b"),
        helper.make_node("Mul", ["rounded", "two"], ["twice"]),
    ]
    weights = [numpy_helper.from_array(np.array(2, np.float32), "two")]
    for name, (scale, zero) in _SETTINGS.items():
        weights.append(numpy_helper.from_array(np.array(scale, np.float32), f"{name}.scale"))
        weights.append(numpy_helper.from_array(np.array(zero, np.uint8), f"{name}.zero"))
    results = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 16])
        for name in ("shares", "twice")
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])
    graph = helper.make_graph(nodes, "quantized", [given], results, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return bytes(model.SerializeToString())


def _pair(source: str, out: str, name: str) -> list[NodeProto]:
    settings = [f"{name}.scale", f"{name}.zero"]
    return [
        helper.make_node("QuantizeLinear", [source, *settings], [f"{out}.q"]),
        helper.make_node("DequantizeLinear", [f"{out}.q", *settings], [out]),
    ]


def compute_quantized(x: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the graph's outputs with numpy."""
    once = round_to_steps(x, *_SETTINGS["a"])
    powers = np.exp(once - once.max(-1, keepdims=True))
    shares = round_to_steps(powers / powers.sum(-1, keepdims=True), *_SETTINGS["c"])
    return {"shares": shares, "twice": 2 * round_to_steps(once, *_SETTINGS["b"])}


def round_to_steps(x: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """Quantize to unsigned 8-bit integers and back."""
    steps = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255)
    return np.asarray((steps - zero) * np.float32(scale), np.float32)
