"""Formulas for variants of GELU, and for activations that were fused into another operator."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, take_input, take_inputs
from splitonnx.partitioner.normalization.fused.operands import find_dtype, refuse, take_optional

_PREFIX = "activation_"
_OF_PRODUCTS: Mapping[str, tuple[str, ...]] = {
    "Celu": ("alpha",),
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "LeakyRelu": ("alpha",),
    "Relu": (),
    "Selu": ("alpha", "gamma"),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "Tanh": (),
    "ThresholdedRelu": ("alpha",),
}
"""The activations that ONNX Runtime fuses into a matrix product, and their attributes."""


def write_gelu(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Compute ``x * (1 + erf(x / sqrt(2))) / 2``."""
    return [_gelu(builder, take_input(node), find_dtype(take_input(node)))]


def write_bias_gelu(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Compute the GELU of ``x + bias``."""
    x, bias = take_inputs(node, 2)
    return [_gelu(builder, builder.op("Add", x, bias), find_dtype(bias))]


def write_fast_gelu(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Compute the tanh approximation of GELU.

    The formula is ``y * (1 + tanh(sqrt(2 / pi) * (y + 0.044715 * y^3))) / 2``.  Here, ``y`` is the
    sum of the input and the bias, or the input alone if the node has no bias.
    """
    x, bias = take_input(node), take_optional(node, 1)
    dtype = find_dtype(x if bias is None else bias)
    if bias is not None:
        x = builder.op("Add", x, bias)
    cube = builder.op("Mul", builder.op("Mul", x, x), x)
    inner = builder.op("Add", x, builder.op("Mul", cube, builder.number(0.044715, dtype)))
    scaled = builder.op("Mul", inner, builder.number(math.sqrt(2 / math.pi), dtype))
    return [_weigh(builder, x, builder.op("Tanh", scaled), dtype)]


def write_quick_gelu(builder: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Compute ``x * sigmoid(alpha * x)``, where ``alpha`` is an attribute of the node."""
    x = take_input(node)
    alpha = builder.number(node.attributes.get_float("alpha", 1.702), find_dtype(x))
    return [builder.op("Mul", x, builder.op("Sigmoid", builder.op("Mul", x, alpha)))]


def write_activation(builder: NodeBuilder, node: ir.Node, value: ir.Value) -> ir.Value:
    """Apply the activation of ``node``, a fused convolution or matrix product, to ``value``.

    Return ``value`` itself if the node has no activation.

    Raises:
        UnsupportedModel: there is no formula for the activation, or an attribute of it is missing.
    """
    kind = node.attributes.get_string("activation", "")
    if kind == "":
        return value
    if node.op_type == "FusedGemm":
        return _activate_product(builder, node, kind, value)
    attribute = node.attributes.get("activation_params")
    given = list(attribute.as_floats()) if attribute is not None else []
    if kind in ("Relu", "Sigmoid", "Tanh"):
        return builder.op(kind, value)
    if kind == "LeakyRelu" and given:
        return builder.op(kind, value, alpha=given[0])
    if kind == "HardSigmoid" and len(given) == 2:
        return builder.op(kind, value, alpha=given[0], beta=given[1])
    if kind == "Clip" and len(given) == 2:
        dtype = find_dtype(take_input(node, 1))
        return builder.op(kind, value, *(builder.number(bound, dtype) for bound in given))
    raise refuse(node, f"its activation '{kind}' cannot be written out")


def _activate_product(builder: NodeBuilder, node: ir.Node, kind: str, value: ir.Value) -> ir.Value:
    """Apply the activation ``kind``; each attribute has the name of the operator's, prefixed.

    ONNX Runtime has no defaults for these attributes: it loads no node that lacks one.
    """
    names = _OF_PRODUCTS.get(kind)
    if names is None:
        raise refuse(node, f"its activation '{kind}' cannot be written out")
    lacking = [name for name in names if f"{_PREFIX}{name}" not in node.attributes]
    if lacking:
        raise refuse(node, f"its activation '{kind}' has no attribute '{_PREFIX}{lacking[0]}'")
    given = {name: node.attributes[f"{_PREFIX}{name}"].as_float() for name in names}
    return builder.op(kind, value, **given)


def _gelu(builder: NodeBuilder, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    error = builder.op("Erf", builder.op("Div", x, builder.number(math.sqrt(2), dtype)))
    return _weigh(builder, x, error, dtype)


def _weigh(builder: NodeBuilder, x: ir.Value, gate: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Compute ``x * (1 + gate) / 2``."""
    raised = builder.op("Add", gate, builder.number(1.0, dtype))
    return builder.op("Mul", builder.op("Mul", x, raised), builder.number(0.5, dtype))
