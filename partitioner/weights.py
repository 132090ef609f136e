"""Weights: which tensors of a model are its parameters, taken out of the graph and put back.

A weight becomes a graph input, so that what is differentiated stays small whatever the model
weighs.  This module knows operators' settings from their weights; it knows no training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.manifests import Role

_FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16}

_CONSTANT_USES = {
    ("BatchNormalization", 3),
    ("BatchNormalization", 4),
    ("Clip", 1),
    ("Clip", 2),
    ("DequantizeLinear", 1),
    ("NegativeLogLikelihoodLoss", 2),
    ("OneHot", 2),
    ("Pad", 2),
    ("QuantizeLinear", 1),
    ("Resize", 1),
    ("Resize", 2),
    ("SoftmaxCrossEntropyLoss", 2),
    ("Upsample", 1),
}
"""(operator, input index) where a float initializer is a setting, not a weight to train."""


def lift_weights(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
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


def restore_weights(graph: ir.Graph, weights: Mapping[str, np.ndarray]) -> None:
    """Turn graph inputs back into initializers: the inverse of lifting the weights."""
    for value in [value for value in graph.inputs if value.name in weights]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[value.name or ""], name=value.name)
        graph.register_initializer(value)


def assign_roles(
    weights: Mapping[str, ir.TensorProtocol],
    statistics: set[str],
    buffers: set[str],
    freeze: Sequence[str],
) -> dict[str, Role]:
    """Say what each weight is: a parameter to train, a frozen one, or a running statistic."""
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
