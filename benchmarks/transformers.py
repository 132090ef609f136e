"""Transformers in ONNX: what benchmarks share.  Weights are random."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def build_transformer(width: int = 64, length: int = 64, layers: int = 2) -> onnx.ModelProto:
    """Encoder layers of self-attention with one head, LayerNormalization and GELU; 10 classes.

    Layer ``i`` ends in ``layer<i>``, and the mean over all places is ``mean``.
    """
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def add(kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"v{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def draw(*shape: int, scale: float = 0.1) -> str:
        name = f"w{len(weights)}"
        values = (random.standard_normal(shape) * scale).astype(np.float32)
        weights.append(numpy_helper.from_array(values, name))
        return name

    def hold(value: float) -> str:
        name = f"w{len(weights)}"
        weights.append(numpy_helper.from_array(np.array(value, np.float32), name))
        return name

    value = "x"
    for layer in range(layers):
        query, key, content = (add("MatMul", value, draw(width, width)) for _ in range(3))
        scores = add("MatMul", query, add("Transpose", key, perm=[0, 2, 1]))
        weighed = add("Softmax", add("Mul", scores, hold(width**-0.5)), axis=-1)
        value = add("Add", value, add("MatMul", weighed, content))
        value = add("LayerNormalization", value, draw(width), draw(width))
        inner = add("Add", add("MatMul", value, draw(width, 4 * width)), draw(4 * width))
        erf = add("Erf", add("Div", inner, hold(2**0.5)))
        gelu = add("Mul", add("Mul", inner, add("Add", erf, hold(1.0))), hold(0.5))
        value = add("Add", value, add("MatMul", gelu, draw(4 * width, width)), name=f"layer{layer}")
    mean = add("ReduceMean", value, axes=[1], keepdims=0, name="mean")
    nodes.append(helper.make_node("MatMul", [mean, draw(width, 10)], ["y"], name="y"))
    graph = helper.make_graph(
        nodes,
        "transformer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", length, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
