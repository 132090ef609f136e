"""Rewrite operators that normalize instances, groups, or elements along certain axes.

onnxruntime-training differentiates only one of these operators, LayerNormalization.  It supports
only the gradient of the first output, and the scale must have the shape of the normalized axes.
The rewrites compute the variance from the centred values; computing it as the mean of the squares
minus the square of the mean would lose precision by cancellation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims, require_rank, take_inputs

Values = Sequence[ir.Value | None]


def rewrite_instance_norm(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite InstanceNormalization, for which onnxruntime-training has no gradient.

    Each channel of each sample is normalized over its spatial axes: with LayerNormalization if the
    image size is known, and with the explicit formula otherwise.  The scale and the bias have one
    element per channel.
    """
    x, scale, bias = take_inputs(node, 3)
    rank = require_rank(node, x)
    normal = _normalize_rows(builder, node, x, list(range(2, rank)), 1e-5)
    return [_scale_channels(builder, normal, scale, bias, rank)]


def rewrite_group_norm(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite GroupNormalization, for which onnxruntime-training has no gradient.

    Each group of channels of each sample is normalized.  The scale and the bias have one element
    per channel, as in opset 21.  In opset 18, they had one element per group, but onnx's checker
    rejects that version as deprecated.
    """
    x, scale, bias = take_inputs(node, 3)
    rank = require_rank(node, x)
    groups = node.attributes.get_int("num_groups")
    assert groups is not None
    dims = known_dims(x) or []
    channels = dims[1] if len(dims) > 1 else None
    if channels is None:
        raise _refuse(node, f"the number of channels of '{x.name}'")
    shape = builder.op(
        "Concat", builder.integers([0, groups, channels // groups]), builder.shape(x, 2), axis=0
    )
    grouped = builder.op("Reshape", x, shape if rank > 2 else builder.integers([0, groups, -1]))
    space = dims[2:]
    grouped.type = x.type
    assert x.shape is not None
    grouped.shape = ir.Shape([x.shape[0], groups, channels // groups, *space])
    stash = ir.DataType(node.attributes.get_int("stash_type", ir.DataType.FLOAT.value))
    wide = _widen(builder, grouped, stash)
    normal = _normalize_rows(builder, node, wide, list(range(2, rank + 1)), 1e-5)
    normal = builder.op("Reshape", _narrow(builder, normal, wide, x), builder.shape(x))
    return [_scale_channels(builder, normal, scale, bias, rank)]


def rewrite_layer_norm(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite LayerNormalization if onnxruntime-training cannot differentiate it.

    The node is replaced with its formula if its second output (the mean) or its third output (the
    inverse of the standard deviation) is used, or if the scale or the bias is broadcast.  If only
    the bias is missing, a bias of zeros is added, because the gradient of LayerNormalization
    requires one.  Other nodes are left unchanged.
    """
    x, scale = take_inputs(node, 2)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    rank = require_rank(node, x)
    axes = _last_axes(node, rank)
    used = any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
    dims = known_dims(x) or []
    whole = known_dims(scale) == dims[axes[0] :] and None not in dims[axes[0] :]
    if not used and bias is None and whole:
        zero = builder.op("Expand", builder.number(0.0, scale.dtype), builder.shape(scale))
        return builder.ops("LayerNormalization", [x, scale, zero], 3, dict(node.attributes))
    if not used and bias is not None and whole and known_dims(bias) == known_dims(scale):
        return None
    wide = _widen(builder, x, _read_stash(node))
    mean = builder.op("ReduceMean", wide, builder.integers(axes), keepdims=1)
    centred = builder.op("Sub", wide, mean)
    inverse = _invert_root(builder, node, centred, axes, wide.dtype)
    normal = _narrow(builder, builder.op("Mul", centred, inverse), wide, x)
    y = builder.op("Mul", normal, scale)
    return [y if bias is None else builder.op("Add", y, bias), mean, inverse]


def rewrite_rms_norm(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite RMSNormalization as x / sqrt(mean(x**2) + epsilon) * scale (arXiv 1910.07467).

    onnxruntime-training has no gradient for RMSNormalization.
    """
    x, scale = take_inputs(node, 2)
    axes = _last_axes(node, require_rank(node, x))
    wide = _widen(builder, x, _read_stash(node))
    normal = builder.op("Mul", wide, _invert_root(builder, node, wide, axes, wide.dtype))
    return [builder.op("Mul", _narrow(builder, normal, wide, x), scale)]


def rewrite_mean_variance_norm(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite MeanVarianceNormalization as (x - mean) / (deviation + 1e-9).

    The deviation is computed as sqrt(variance + 1e-18), which keeps the gradient finite if all the
    normalized elements are equal.  onnxruntime-training has no gradient for this operator.
    """
    (x,) = take_inputs(node, 1)
    axes = builder.integers(list(node.attributes.get_ints("axes", [0, 2, 3])))
    centred = builder.op("Sub", x, builder.op("ReduceMean", x, axes, keepdims=1))
    square = builder.op("Mul", centred, centred)
    variance = builder.op("ReduceMean", square, axes, keepdims=1)
    root = builder.op("Sqrt", builder.op("Add", variance, builder.number(1e-18, x.dtype)))
    return [builder.op("Div", centred, builder.op("Add", root, builder.number(1e-9, x.dtype)))]


def rewrite_lp_norm(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite LpNormalization as x / norm, where the norm is computed along one axis.

    The result is 0 if the norm is 0.  onnxruntime-training has no gradient for LpNormalization.
    """
    (x,) = take_inputs(node, 1)
    axis = builder.integers([node.attributes.get_int("axis", -1)])
    if node.attributes.get_int("p", 2) == 1:
        norm = builder.op("ReduceSum", builder.op("Abs", x), axis, keepdims=1)
    else:
        square = builder.op("ReduceSum", builder.op("Mul", x, x), axis, keepdims=1)
        # the root of zero has no gradient, so a norm of zero is replaced by one
        norm = builder.op("Sqrt", _replace_zeros(builder, square, x.dtype))
    return [builder.op("Div", x, _replace_zeros(builder, norm, x.dtype))]


def _replace_zeros(builder: NodeBuilder, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    empty = builder.op("Equal", value, builder.number(0.0, dtype))
    return builder.op("Where", empty, builder.number(1.0, dtype), value)


def _normalize_rows(
    builder: NodeBuilder, node: ir.Node, x: ir.Value, axes: list[int], epsilon: float
) -> ir.Value:
    """Return (x - mean) / sqrt(variance + epsilon) over the last axes.

    If the sizes of these axes are known, flat rows are normalized with LayerNormalization, whose
    gradient is one fused kernel.  Otherwise, the formula is used.
    """
    dims = (known_dims(x) or [])[axes[0] :] if axes else []
    sizes = [dim for dim in dims if dim is not None]
    if axes and len(sizes) == len(dims) == len(axes):
        size = math.prod(sizes)
        lead = [0] * axes[0]
        rows = builder.op("Reshape", x, builder.integers([*lead, size]))
        one = builder.op("Expand", builder.number(1.0, x.dtype), builder.integers([size]))
        zero = builder.op("Expand", builder.number(0.0, x.dtype), builder.integers([size]))
        epsilon = node.attributes.get_float("epsilon", epsilon)
        kept = builder.ops("LayerNormalization", [rows, one, zero], 3, {"epsilon": epsilon})
        return builder.op("Reshape", kept[0], builder.integers([*lead, *sizes]))
    mean = builder.op("ReduceMean", x, builder.integers(axes), keepdims=1)
    centred = builder.op("Sub", x, mean)
    return builder.op("Mul", centred, _invert_root(builder, node, centred, axes, x.dtype))


def _invert_root(
    builder: NodeBuilder, node: ir.Node, value: ir.Value, axes: list[int], dtype: ir.DataType | None
) -> ir.Value:
    """Return 1 / sqrt(mean(value**2) + epsilon)."""
    epsilon = builder.number(node.attributes.get_float("epsilon", 1e-5), dtype)
    square = builder.op("Mul", value, value)
    mean = builder.op("ReduceMean", square, builder.integers(axes), keepdims=1)
    return builder.op(
        "Div", builder.number(1.0, dtype), builder.op("Sqrt", builder.op("Add", mean, epsilon))
    )


def _scale_channels(
    builder: NodeBuilder, x: ir.Value, scale: ir.Value, bias: ir.Value, rank: int
) -> ir.Value:
    """Return x * scale + bias; both have one element per channel."""
    if rank > 2:
        axes = builder.integers(range(1, rank - 1))
        scale, bias = builder.op("Unsqueeze", scale, axes), builder.op("Unsqueeze", bias, axes)
    return builder.op("Add", builder.op("Mul", x, scale), bias)


def _last_axes(node: ir.Node, rank: int) -> list[int]:
    axis = node.attributes.get_int("axis", -1)
    return list(range(axis % rank, rank))


def _read_stash(node: ir.Node) -> ir.DataType:
    return ir.DataType(node.attributes.get_int("stash_type", ir.DataType.FLOAT.value))


def _widen(builder: NodeBuilder, x: ir.Value, stash: ir.DataType) -> ir.Value:
    """Cast to the type in which statistics are computed, unless that would lose digits."""
    assert x.dtype is not None
    return builder.cast(x, stash) if x.dtype.itemsize < stash.itemsize else x


def _narrow(builder: NodeBuilder, value: ir.Value, wide: ir.Value, x: ir.Value) -> ir.Value:
    value.type = wide.type
    return builder.cast(value, x.dtype)


def _refuse(node: ir.Node, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"node '{node.name}' ({node.op_type})",
        f"{what} is not known",
        "export the model with shapes",
    )
