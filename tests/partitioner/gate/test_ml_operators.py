"""Operators that scikit-learn's exporter writes around a network, against their definitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.gate.ml_operators import (
    DOMAIN,
    ESTIMATORS,
    normalize_ml_operators,
    unwrap_maps,
)

FLOAT, INT64, DOUBLE = TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE


def build(
    kind: str, inputs: Mapping[str, tuple[int, tuple[int, ...]]], **attributes: Any
) -> onnx.ModelProto:
    node = helper.make_node(kind, [*inputs], ["y"], name="node", domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info("y", FLOAT, None)],
    )  # fmt: skip
    graph.output[0].CopyFrom(onnx.ValueInfoProto(name="y"))
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 3)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def normalize(proto: onnx.ModelProto) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    normalize_ml_operators(model.graph)
    assert all(not node.domain for node in model.graph)
    return ir.to_proto(model)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    (found,) = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(found)


@pytest.mark.parametrize(
    "attributes",
    [
        {"offset": [1.0, -2.0, 0.5], "scale": [2.0, 0.5, 4.0]},
        {"offset": [1.0], "scale": [2.0]},
        {"scale": [2.0, 0.5, 4.0]},
        {"offset": [3.0]},
        {},
    ],
)
@pytest.mark.parametrize("dtype", [FLOAT, INT64, DOUBLE])
def test_a_scaler_shifts_and_scales_to_floats(attributes: dict[str, Any], dtype: int) -> None:
    x = np.array([[1, 2, 3], [-4, 5, 6]], helper.tensor_dtype_to_np_dtype(dtype))
    model = normalize(build("Scaler", {"x": (dtype, x.shape)}, **attributes))
    found = run(model, {"x": x})
    offset, scale = attributes.get("offset", [0.0]), attributes.get("scale", [1.0])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (x - np.array(offset)) * np.array(scale), rtol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
def test_an_extractor_picks_columns_of_the_last_axis(shape: tuple[int, ...]) -> None:
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    picks = np.array([[3, 0]], np.int64)
    inputs = {"x": (FLOAT, shape), "picks": (INT64, picks.shape)}
    proto = build("ArrayFeatureExtractor", inputs)
    found = run(normalize(proto), {"x": x, "picks": picks})
    np.testing.assert_array_equal(found, np.atleast_2d(x)[..., [3, 0]])
    np.testing.assert_array_equal(found, run(proto, {"x": x, "picks": picks}))


def build_classifier() -> onnx.ModelProto:
    """A softmax that a ZipMap makes dictionaries of."""
    graph = helper.make_graph(
        [
            helper.make_node("Softmax", ["x"], ["p"], name="soft"),
            helper.make_node(
                "ZipMap", ["p"], ["maps"], domain=DOMAIN, name="zip", classlabels_int64s=[0, 1, 2]
            ),
        ],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 3])],
        [
            helper.make_value_info(
                "maps",
                helper.make_sequence_type_proto(
                    helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, []))
                ),
            )
        ],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 3)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def test_dictionaries_become_the_tensor_of_probabilities() -> None:
    proto = build_classifier()
    before = proto.SerializeToString(deterministic=True)
    unwrapped = unwrap_maps(proto)
    assert proto.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(unwrapped)
    (output,) = unwrapped.graph.output
    assert output.name == "maps"
    assert output.type.tensor_type.elem_type == FLOAT
    assert len(output.type.tensor_type.shape.dim) == 2
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    expected = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    np.testing.assert_allclose(run(unwrapped, {"x": x}), expected, rtol=1e-6)


def test_a_model_without_dictionaries_is_handed_back_itself() -> None:
    proto = build("Scaler", {"x": (FLOAT, (2, 3))})
    assert unwrap_maps(proto) is proto


def test_trees_are_refused_at_the_gate() -> None:
    assert "TreeEnsembleClassifier" not in ESTIMATORS
    with pytest.raises(UnsupportedModel, match=r"'node' \(TreeEnsembleRegressor\).*ai\.onnx\.ml"):
        open_model(build("TreeEnsembleRegressor", {"x": (FLOAT, (2, 3))}))
