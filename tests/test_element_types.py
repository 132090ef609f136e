"""Each element type goes by its names in onnx, ONNX Runtime, safetensors and numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save

from splitonnx.element_types import ELEMENT_TYPES, ElementType

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("kind", ELEMENT_TYPES, ids=lambda kind: kind.name)
def test_onnx_knows_the_number_as_the_same_dtype(kind: ElementType) -> None:
    assert helper.tensor_dtype_to_np_dtype(kind.code) == kind.dtype


@pytest.mark.parametrize("kind", ELEMENT_TYPES, ids=lambda kind: kind.name)
def test_safetensors_writes_the_dtype_under_the_name(kind: ElementType) -> None:
    content = save({"x": np.zeros(3, kind.dtype)})
    size = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + size])["x"]["dtype"] == kind.name


@pytest.mark.parametrize("kind", ELEMENT_TYPES, ids=lambda kind: kind.name)
def test_onnx_runtime_calls_an_input_of_the_number_so(kind: ElementType) -> None:
    value = helper.make_tensor_value_info("x", kind.code, [3])
    output = helper.make_tensor_value_info("y", TensorProto.INT64, [1])
    graph = helper.make_graph([helper.make_node("Shape", ["x"], ["y"])], "g", [value], [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert session.get_inputs()[0].type == kind.runtime


def test_no_name_stands_twice() -> None:
    for column in zip(*ELEMENT_TYPES, strict=True):
        assert len(set(column)) == len(ELEMENT_TYPES)
