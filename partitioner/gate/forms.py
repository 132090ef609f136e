"""Check a model with onnx's own checker and type inference, without reading its weights."""

from __future__ import annotations

import math
from dataclasses import replace

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from splitonnx.errors import NativeCrash, NotAModel
from splitonnx.partitioner.gate.walks import label_node, list_graphs
from splitonnx.partitioner.native import natives
from splitonnx.partitioner.native.workers import Refused, call

_MOST_ELEMENTS = 1024
"""Tensors with more elements are not passed to onnx: they are weights and do not affect types."""


def check_form(model: ModelProto, label: str) -> None:
    """Check a model's operators, attributes and types against onnx's schemas.

    Raises:
        NotAModel: onnx's checker or its type inference rejects the model.
        NativeCrash: the checker or the type inference crashes on the model.
    """
    light = _strip(model)
    try:
        call(natives.check_form, label, light.SerializeToString())
    except Refused as error:
        reason = " ".join(str(error).split()).split(" ==> ")[0][:400]
        raise NotAModel(label, reason) from error
    except NativeCrash as error:
        raise replace(error, subject=label_node(_find_culprit(light))) from error


def check_declared_types(model: ModelProto, label: str) -> None:
    """Check that no tensor is declared with another element type than onnx infers for it.

    ONNX Runtime refuses such a model, and everything behind the tensor would have a wrong type.
    The model must have passed :func:`check_form`.

    Raises:
        NotAModel: a declared type contradicts the node that computes the tensor.
    """
    light = _strip(model)
    for graph in list_graphs(light):
        del graph.value_info[:]
    del light.graph.output[:]
    try:
        inferred = call(natives.infer_shapes, label, light.SerializeToString(), False)
    except (Refused, NativeCrash):
        return  # nothing is known then
    typed = ModelProto.FromString(inferred)
    for given, found in zip(list_graphs(model), list_graphs(typed), strict=True):
        known = {value.name: value.type.tensor_type.elem_type for value in found.value_info}
        for value in (*given.value_info, *given.output):
            declared, made = value.type.tensor_type.elem_type, known.get(value.name, 0)
            if declared and made and declared != made:
                maker = next(node for node in given.node if value.name in node.output)
                name = TensorProto.DataType.Name
                raise NotAModel(
                    label,
                    f"it declares '{value.name}' as {name(declared)}, but {label_node(maker)} "
                    f"computes {name(made)}; export it again, or correct the declared type",
                )


def _find_culprit(light: ModelProto) -> NodeProto:
    """Find the node on which native code crashes.

    Each attempt takes a new process, so this uses bisection.
    """
    safe, broken = 0, len(light.graph.node)
    part = ModelProto()
    while broken - safe > 1:
        middle = (safe + broken) // 2
        part.CopyFrom(light)
        del part.graph.node[middle:], part.graph.output[:]
        try:
            call(natives.check_form, "", part.SerializeToString())
        except NativeCrash:
            broken = middle
            continue
        except Refused:
            pass
        safe = middle
    culprit: NodeProto = light.graph.node[broken - 1]
    return culprit


def _strip(model: ModelProto) -> ModelProto:
    """Copy a model, with its large weights replaced by inputs so that they are not copied."""
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
    """Return the tensor that a Constant node holds, if it is large."""
    if node.op_type != "Constant" or len(node.output) != 1 or len(node.attribute) != 1:
        return None
    tensor = node.attribute[0].t
    return tensor if node.attribute[0].name == "value" and _is_large(tensor) else None


def _is_large(tensor: TensorProto) -> bool:
    elements = math.prod(tensor.dims)
    return elements > _MOST_ELEMENTS or tensor.data_location == TensorProto.EXTERNAL


def _declare(graph: GraphProto, name: str, tensor: TensorProto) -> None:
    graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
