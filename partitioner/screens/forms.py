"""Form: onnx's own checker and type inference look at the model, without its weights' data."""

from __future__ import annotations

import math

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from splitonnx.errors import NotAModel

_MOST_ELEMENTS = 1024
"""Larger tensors hold weights, whose values no type depends on."""


def check_form(model: ModelProto, label: str) -> None:
    """Check what onnx's schemas say of operators, attributes and types.

    Raises:
        NotAModel: onnx's checker or its inference refuses the model.
    """
    light = _strip(model)
    try:
        onnx.checker.check_model(light)
        onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=False)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        ValueError,
        RuntimeError,
    ) as error:
        reason = " ".join(str(error).split()).split(" ==> ")[0]
        raise NotAModel(label, reason[:400]) from error
    except MemoryError as error:
        raise NotAModel(label, "to infer its types takes more memory than there is") from error


def _strip(model: ModelProto) -> ModelProto:
    """Copy a model with its large weights as inputs, so that checking copies no weight."""
    light = ModelProto()
    light.ir_version = max(model.ir_version, 4)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name or "graph"
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    named = {value.name for value in model.graph.input}
    for node in model.graph.node:
        held = _find_held(node)
        if held is None:
            graph.node.append(node)
        else:
            _declare(graph, node.output[0], held)
    for tensor in model.graph.initializer:
        if not _is_large(tensor):
            graph.initializer.append(tensor)
        elif tensor.name not in named:
            _declare(graph, tensor.name, tensor)
    return light


def _find_held(node: NodeProto) -> TensorProto | None:
    """Give the large tensor that a Constant node holds."""
    if node.op_type != "Constant" or len(node.output) != 1 or len(node.attribute) != 1:
        return None
    tensor = node.attribute[0].t
    return tensor if node.attribute[0].name == "value" and _is_large(tensor) else None


def _is_large(tensor: TensorProto) -> bool:
    elements = math.prod(tensor.dims)
    return elements > _MOST_ELEMENTS or tensor.data_location == TensorProto.EXTERNAL


def _declare(graph: GraphProto, name: str, tensor: TensorProto) -> None:
    graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
