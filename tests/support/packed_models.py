"""A model with weights of 4 bits, as tools for language models write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.gate.fused_operators import DOMAIN

INNER, OUTER, BLOCK = 64, 8, 32


def build_packed(*, level: int) -> onnx.ModelProto:
    """Build a model with one MatMulNBits of this accuracy level; 0 leaves the attribute out."""
    random = np.random.default_rng(0)
    blocks = INNER // BLOCK
    arrays: dict[str, np.ndarray] = {
        "w1": random.standard_normal((3, INNER)).astype(np.float32),
        "packed_weight": random.integers(0, 256, (OUTER, blocks, BLOCK // 2)).astype(np.uint8),
        "scales": random.uniform(0.01, 0.1, OUTER * blocks).astype(np.float32),
        "w2": random.standard_normal((OUTER, 2)).astype(np.float32),
    }
    settings: dict[str, Any] = {"K": INNER, "N": OUTER, "bits": 4, "block_size": BLOCK}
    settings |= {"accuracy_level": level} if level else {}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Tanh", ["a"], ["h"]),
        helper.make_node(
            "MatMulNBits",
            ["h", "packed_weight", "scales"],
            ["z"],
            "packed",
            domain=DOMAIN,
            **settings,
        ),
        helper.make_node("MatMul", ["z", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "packed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def draw_packed() -> dict[str, np.ndarray]:
    """Draw inputs of this model."""
    return {"x": np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)}
