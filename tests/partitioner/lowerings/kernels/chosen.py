"""A graph of one node, before and after its kernel is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

from splitonnx.partitioner.lowerings.kernels.choices import choose_kernels

Arrays = Mapping[str, np.ndarray]


def build(
    kind: str,
    arrays: Arrays,
    outputs: Sequence[str],
    *,
    domain: str = "",
    **attributes: Any,
) -> ir.Model:
    """A model of one node that reads the arrays in their order; batches of images have any size."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(a.dtype) for name, a in arrays.items()}
    first = next(iter(kinds.values()), TensorProto.FLOAT)
    inputs = [
        helper.make_tensor_value_info(
            name, kinds[name], ["N", *a.shape[1:]] if a.ndim == 4 and name != "w" else list(a.shape)
        )
        for name, a in arrays.items()
    ]
    node = helper.make_node(kind, list(arrays), list(outputs), "node", domain=domain, **attributes)
    wanted = [helper.make_tensor_value_info(name, first, None) for name in outputs if name]
    graph = helper.make_graph([node], "case", inputs, wanted)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def run(model: ir.Model, arrays: Arrays) -> dict[str, np.ndarray]:
    """Run a model as a training stage is run: without optimization."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    names = [value.name for value in session.get_outputs()]
    used = [value.name for value in session.get_inputs()]
    return dict(zip(names, session.run(None, {n: arrays[n] for n in used}), strict=True))


def choose(model: ir.Model) -> list[str]:
    """Choose the model's kernels in place; list the operators that it has then."""
    choose_kernels(model.graph)
    return [node.op_type for node in model.graph if node.op_type != "Constant"]
