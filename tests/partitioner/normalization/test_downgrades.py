"""Operators newer than opset 21 keep their meaning in operators of opset 21."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.partitioner.normalization.opset_models import adapt, run
from tests.support.node_cases import list_node_cases

NEW = [
    "Attention", "CausalConvWithState", "CumProd", "LinearAttention", "RMSNormalization",
    "RotaryEmbedding", "SpaceToDepth", "SwiGLU", "Swish", "TensorScatter",
]  # fmt: skip


@pytest.mark.parametrize("operator", NEW)
def test_newer_operators_come_down_in_all_their_cases(operator: str) -> None:
    checked = 0
    for case in list_node_cases(operator):
        dtypes = {array.dtype.name for array in case.inputs.values()}
        if "bfloat16" in dtypes or "float64" in dtypes:  # ONNX Runtime has no such kernels
            continue
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        feeds = dict(case.inputs)
        if operator == "CumProd":
            axis = model.graph.input.pop()
            model.graph.initializer.append(numpy_helper.from_array(feeds.pop(axis.name), axis.name))
        found = run(adapt(model), feeds)
        tolerance = 2e-3 if "float16" in dtypes else 1e-4
        for array, (name, expected) in zip(found, case.outputs.items(), strict=True):
            np.testing.assert_allclose(
                array, expected, rtol=tolerance, atol=tolerance, err_msg=f"{case.name} {name}"
            )
        checked += 1
    assert checked or operator == "CumProd"
