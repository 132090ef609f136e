"""Bring a model into the two forms that the rest works on: one to train, one to predict.

Both forms share every tensor name, so that one cut fits both.  Weights leave the graph and
become graph inputs: what is differentiated stays small, whatever the model weighs.  This module
knows operators' modes in training and inference; it knows no cut, no loss and no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveInitializersFromInputsPass, ShapeInferencePass

from splitonnx.errors import UnsupportedModel
from splitonnx.manifests import KEY, Role
from splitonnx.partitioner.batchnorms import (
    freeze_batchnorms,
    list_batchnorms,
    settle_batchnorms,
    train_batchnorms,
)
from splitonnx.partitioner.dropouts import drop_dropouts, key_dropouts
from splitonnx.partitioner.frontiers import find_dependents
from splitonnx.partitioner.paddings import settle_paddings

LOWEST_OPSET, HIGHEST_OPSET = 18, 21
"""Dropout's mask needs BitwiseXor (18); onnxruntime 1.19.2 ends at 21."""
IR_VERSION = 10

_FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16}

_CONSTANT_USES = {
    ("BatchNormalization", 3),
    ("BatchNormalization", 4),
    ("Clip", 1),
    ("Clip", 2),
    ("DequantizeLinear", 1),
    ("OneHot", 2),
    ("Pad", 2),
    ("QuantizeLinear", 1),
    ("Resize", 1),
    ("Resize", 2),
    ("Upsample", 1),
}
"""(operator, input index) where a float initializer is a setting, not a weight to train."""

BatchNormMode = Literal["train", "frozen"]
DropoutMode = Literal["keep", "off"]


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model in its two forms.

    ``skeleton`` is what both were made from: the model itself, its weights as inputs, with all
    of its outputs; ``training`` and ``inference`` keep those that depend on the model's inputs.
    ``weights`` holds the tensors that became graph inputs, in the model's order, and ``roles``
    what each is.  ``next_buffers`` maps a running statistic to the value in ``training`` that
    replaces it after a step.
    """

    training: ir.Model
    inference: ir.Model
    skeleton: ir.Model
    weights: Mapping[str, ir.TensorProtocol]
    roles: Mapping[str, Role]
    next_buffers: Mapping[str, str]

    @property
    def state(self) -> frozenset[str]:
        """Names of the graph inputs that are no data: the weights, and Dropout's key."""
        return frozenset({*self.weights, KEY})

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the trained parameters, in the model's order."""
        return tuple(name for name, role in self.roles.items() if role is Role.PARAMETER)


def prepare(
    model: ir.Model,
    *,
    batchnorm: BatchNormMode | None = None,
    dropout: DropoutMode | None = None,
    freeze: Sequence[str] = (),
) -> PreparedModel:
    """Prepare a gated model; ``model`` itself is consumed.

    ``batchnorm`` and ``dropout`` overrule what the model says; ``freeze`` holds regular
    expressions, and a parameter that one of them finds (``re.search``) keeps its value.

    Raises:
        UnsupportedModel: its operators cannot be brought to opset 18 to 21, or a pattern in
            ``freeze`` fits no parameter.
    """
    model = InlinePass()(model).model
    RemoveInitializersFromInputsPass()(model)
    _name_nodes(model.graph)
    weights = _lift_weights(model.graph)
    model = adapt_opset(model)
    ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)(model)
    settle_paddings(model.graph)

    skeleton, training, inference = model, model.clone(), model.clone()
    buffers = train_batchnorms(training.graph, mode=batchnorm)
    frozen_statistics = freeze_batchnorms(training.graph)
    key_dropouts(training.graph, mode=dropout)
    _declare_statistics(training.graph)
    settle(inference.graph)
    for form in (training, inference):
        ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)(form)
    for form in (training, inference):
        _keep_data_outputs(form.graph, weights)

    _refuse_unkept_statistics(buffers, weights)
    roles = _assign_roles(weights, {*buffers, *frozen_statistics}, set(buffers), freeze)
    return PreparedModel(
        training=training,
        inference=inference,
        skeleton=skeleton,
        weights=weights,
        roles=roles,
        next_buffers=buffers,
    )


_KEPT_OUTPUTS = {
    "LayerNormalization": ("mean", "inv_std"),
    "SoftmaxCrossEntropyLoss": ("log_prob",),
}
"""Optional outputs that the gradient of an operator reads."""


def _declare_statistics(graph: ir.Graph) -> None:
    """Declare the optional outputs that gradients need."""
    for node in graph:
        kinds = _KEPT_OUTPUTS.get(node.op_type, ())
        if node.domain or len(node.outputs) > len(kinds) or not kinds:
            continue
        node.resize_outputs(1 + len(kinds))
        for value, kind in zip(node.outputs[1:], kinds, strict=True):
            value.name = value.name or f"{node.outputs[0].name}#{kind}"


def settle(graph: ir.Graph) -> None:
    """Turn a model into its inference form, in place."""
    settle_batchnorms(graph)
    drop_dropouts(graph)


def restore_weights(graph: ir.Graph, weights: Mapping[str, np.ndarray]) -> None:
    """Turn graph inputs back into initializers: the inverse of lifting the weights."""
    for value in [value for value in graph.inputs if value.name in weights]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[value.name or ""], name=value.name)
        graph.register_initializer(value)


def _keep_data_outputs(graph: ir.Graph, weights: Collection[str]) -> None:
    """Drop outputs that no input of the model reaches, and running statistics among them."""
    data = find_dependents(graph, [value for value in graph.inputs if value.name not in weights])
    statistics = {value for node in list_batchnorms(graph) for value in node.outputs[1:]}
    kept = [value for value in graph.outputs if value in data and value not in statistics]
    graph.outputs.clear()
    graph.outputs.extend(kept)


def _name_nodes(graph: ir.Graph) -> None:
    """Give every node a name of its own: errors, cuts and Dropout's keys go by it."""
    taken: set[str] = set()
    for index, node in enumerate(graph):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}"
            while node.name in taken:
                node.name += "_"
        taken.add(node.name)


def _lift_weights(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Turn float initializers of rank 1 and up into graph inputs and return their tensors.

    Scalars stay: exporters write constants such as an exponent or a scale so.
    """
    lifted: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _FLOATS or len(tensor.shape) == 0:
            continue
        uses = {(use.node.op_type, use.idx) for use in value.uses()}
        statistics = {("BatchNormalization", 3), ("BatchNormalization", 4)}
        if not uses or (uses & _CONSTANT_USES and not uses <= statistics):
            continue
        value.type = ir.TensorType(tensor.dtype)
        value.shape = ir.Shape(tensor.shape.numpy())
        value.const_value = None
        graph.initializers.pop(name)
        graph.inputs.append(value)
        lifted[name] = tensor
    return lifted


def adapt_opset(model: ir.Model) -> ir.Model:
    """Bring a model to opset 18 to 21 and IR version 10.

    Where no operator changed on the way only the number is set; else onnx's converter is asked.
    """
    model.ir_version = IR_VERSION
    version = model.graph.opset_imports.get("", 1)
    target = min(max(version, LOWEST_OPSET), HIGHEST_OPSET)
    if target == version:
        return model
    changed = sorted({n.op_type for n in _all_nodes(model) if _changes(n, version, target)})
    if changed:
        model = _convert(model, target, changed)
        model.ir_version = IR_VERSION
    model.graph.opset_imports[""] = target
    for node in _all_nodes(model):
        node.version = None
    return model


def _all_nodes(model: ir.Model) -> list[ir.Node]:
    return list(model.graph.all_nodes())


def _changes(node: ir.Node, version: int, target: int) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    try:
        schemas = [onnx.defs.get_schema(node.op_type, v, "") for v in (version, target)]
    except onnx.defs.SchemaError:
        return True
    return schemas[0].since_version != schemas[1].since_version


def _convert(model: ir.Model, target: int, changed: Sequence[str]) -> ir.Model:
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(model), target)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedModel(
            f"operators {', '.join(changed)} of opset {model.graph.opset_imports.get('')}",
            f"they cannot be brought to opset {target} ({str(error).strip().splitlines()[0]})",
            f"export the model with opset {LOWEST_OPSET} to {HIGHEST_OPSET}",
        ) from error
    return ir.from_proto(proto)


def _refuse_unkept_statistics(statistics: Collection[str], weights: Collection[str]) -> None:
    for name in statistics:
        if name not in weights:
            raise UnsupportedModel(
                f"running statistic '{name}' of a BatchNormalization",
                "it is computed in the graph, so it cannot be updated",
                "train with --batchnorm frozen",
            )


def _assign_roles(
    weights: Mapping[str, ir.TensorProtocol],
    statistics: set[str],
    buffers: set[str],
    freeze: Sequence[str],
) -> dict[str, Role]:
    roles: dict[str, Role] = {}
    for name in weights:
        if name in buffers:
            roles[name] = Role.BUFFER
        elif name in statistics or any(re.search(pattern, name) for pattern in freeze):
            roles[name] = Role.FROZEN
        else:
            roles[name] = Role.PARAMETER
    for pattern in freeze:
        if not any(re.search(pattern, name) for name in weights):
            raise UnsupportedModel(
                f"--freeze {pattern}",
                "no parameter's name fits this pattern",
                "see the names in `splitonnx inspect`",
            )
    return roles


def read_array(tensor: ir.TensorProtocol) -> np.ndarray:
    """Give a weight as a contiguous little-endian array (mapped where the file was mapped)."""
    return np.ascontiguousarray(tensor.numpy())
