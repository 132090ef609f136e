"""A loss of few classes inside a model is compared with labels that its table has.

ONNX Runtime reads beyond the table of a loss where a label is out of range, so what it gives then
is no result to compare with.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.partitions import cut


def build_attention(classes: int) -> onnx.ModelProto:
    """Build hard attention: the strongest position is gathered, and its class is the label."""
    random = np.random.default_rng(2)
    weights = {
        "w0": random.normal(size=(3, 4)).astype(np.float32),
        "w1": random.normal(size=(4, classes)).astype(np.float32),
        "last": np.array([2]),
        "wide": np.array([1, 1, 4]),
        "middle": np.array([1]),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["product"]),
        helper.make_node("Relu", ["product"], ["seen"]),
        helper.make_node("ReduceSum", ["seen", "last"], ["strength"], keepdims=1),
        helper.make_node("ArgMax", ["strength"], ["place"], axis=1, keepdims=1),
        helper.make_node("Expand", ["place", "wide"], ["places"]),
        helper.make_node("GatherElements", ["seen", "places"], ["found"], axis=1),
        helper.make_node("Squeeze", ["found", "middle"], ["best"]),
        helper.make_node("MatMul", ["best", "w1"], ["scores"]),
        helper.make_node("SoftmaxCrossEntropyLoss", ["scores", "target"], ["loss"]),
    ]
    graph = helper.make_graph(
        nodes, "attention",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 5, 3]),
            helper.make_tensor_value_info("target", TensorProto.INT64, ["N"]),
        ],
        [helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_a_model_with_few_classes_is_compared(
    classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    cut(build_attention(classes), at=None, loss="from-model", output="loss", check=True)
    assert "was not compared" not in caplog.text
