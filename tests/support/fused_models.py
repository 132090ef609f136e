"""Models of one fused operator each, run as they are by ONNX Runtime and written out by onnx's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.partitioner.gate.fused_operators import DOMAIN
from splitonnx.partitioner.normalization.fused.replacements import replace_fused

Arrays = Mapping[str, np.ndarray]


def build_fused(
    kind: str,
    inputs: Sequence[str],
    data: Arrays,
    weights: Arrays,
    outputs: Sequence[str] = ("y",),
    domain: str = DOMAIN,
    **attributes: Any,
) -> onnx.ModelProto:
    """Build a model of one node; inputs with data have a batch that is not fixed."""
    node = helper.make_node(kind, inputs, outputs, name="fused", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        kind,
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(a.dtype), ["N", *a.shape[1:]]
            )
            for name, a in data.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs if name],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def write_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write a model's fused operators in standard operators."""
    copied = ir.from_proto(model)
    replace_fused(copied)
    assert all(not node.domain for node in copied.graph.all_nodes())
    return ir.to_proto(copied)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Draw normal numbers."""
    random = np.random.default_rng((seed, *shape))
    return np.asarray(random.standard_normal(shape), np.float32)


def run_stock(model: onnx.ModelProto, data: Arrays) -> list[np.ndarray]:
    """Run a model as it is in ONNX Runtime, without optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [np.asarray(array) for array in session.run(None, dict(data))]


def optimize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what ONNX Runtime's optimizer makes of a model, with fused operators."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3  # it warns that the file is for this machine only
    with TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        onnxruntime.InferenceSession(model.SerializeToString(), options)
        return onnx.load(options.optimized_model_filepath)


def run_written(model: onnx.ModelProto, data: Arrays) -> list[np.ndarray]:
    """Run a model, once it is written out, by onnx's own evaluator."""
    found = ReferenceEvaluator(write_out(model)).run(None, dict(data))
    assert isinstance(found, list)
    return [np.asarray(array) for array in found]


def hold_fused(model: onnx.ModelProto, data: Arrays) -> list[np.ndarray]:
    """Hold a model that was written out against ONNX Runtime's kernels; return its results."""
    expected, found = run_stock(model, data), run_written(model, data)
    for want, have in zip(expected, found, strict=True):
        assert want.shape == have.shape
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=2e-5)
    return found
