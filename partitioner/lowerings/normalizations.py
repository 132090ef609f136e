"""Replace batch and RMS normalization, and the gradients of batch, layer and RMS normalization.

The replacements use only standard ONNX operators.  In the formulas, ``x`` is the input of the
normalization, and ``dy`` is the gradient of its output.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, require_rank, take_inputs

Values = Sequence[ir.Value | None]


def _spread(builder: NodeBuilder, value: ir.Value, rank: int) -> ir.Value:
    """Reshape [C] to [C, 1, ...], so that it is broadcast along axis 1."""
    if rank == 2:
        return value
    spread = builder.op("Unsqueeze", value, builder.integers(range(1, rank - 1)))
    spread.type = value.type
    return spread


def lower_batch_norm(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace BatchNormInternal, the training form of BatchNormalization, with its formula.

    The outputs are Y, the new running mean, the new running variance, the mean of the batch, and
    the inverse of the batch's standard deviation.  Both Y and the running variance are computed
    from the biased variance, as BatchNormalization-14 defines.
    """
    x, scale, bias, mean, variance = take_inputs(node, 5)
    rank = require_rank(node, x)
    axes = builder.integers([0, *range(2, rank)])
    epsilon = builder.number(node.attributes.get_float("epsilon", 1e-5), x.dtype)
    momentum = node.attributes.get_float("momentum", 0.9)
    batch_mean = builder.op("ReduceMean", x, axes, keepdims=0)
    centred = builder.op("Sub", x, _spread(builder, batch_mean, rank))
    square = builder.op("Mul", centred, centred)
    batch_variance = builder.op("ReduceMean", square, axes, keepdims=0)
    deviation = builder.op("Sqrt", builder.op("Add", batch_variance, epsilon))
    inverse = builder.op("Div", builder.number(1.0, x.dtype), deviation)
    factor = _spread(builder, builder.op("Mul", scale, inverse), rank)
    y = builder.op("Add", builder.op("Mul", centred, factor), _spread(builder, bias, rank))

    def blend(old: ir.Value, new: ir.Value) -> ir.Value:
        kept = builder.op("Mul", old, builder.number(momentum, old.dtype))
        return builder.op(
            "Add", kept, builder.op("Mul", new, builder.number(1 - momentum, old.dtype))
        )

    return [y, blend(mean, batch_mean), blend(variance, batch_variance), batch_mean, inverse]


def lower_batch_norm_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace BatchNormalizationGrad with formulas for the gradients of its three inputs.

    The formulas are:

    dbias = sum(dy), dscale = sum(dy * h), dx = scale * inverse * (dy - (dbias + h * dscale) / n).

    Here dy is the gradient of the output, n is the number of elements per channel, inverse is 1 /
    standard deviation, and h is (x - mean) * inverse.
    """
    dy, x, scale, mean, inverse = take_inputs(node, 5)
    rank = require_rank(node, x)
    axes = builder.integers([0, *range(2, rank)])
    centred = builder.op("Sub", x, _spread(builder, mean, rank))
    dbias = builder.op("ReduceSum", dy, axes, keepdims=0)
    weighted = builder.op("ReduceSum", builder.op("Mul", dy, centred), axes, keepdims=0)
    dscale = builder.op("Mul", weighted, inverse)
    count = builder.cast(
        builder.op("Div", builder.op("Size", x), builder.op("Size", scale)), x.dtype
    )
    # dx = factor * dy - slope * centred - shift: three passes over the elements instead of five
    factor = builder.op("Mul", scale, inverse)
    share = builder.op("Div", factor, count)
    slope = builder.op("Mul", share, builder.op("Mul", inverse, dscale))
    shift = builder.op("Mul", share, dbias)
    dx = builder.op("Mul", dy, _spread(builder, factor, rank))
    dx = builder.op("Sub", dx, builder.op("Mul", centred, _spread(builder, slope, rank)))
    return [builder.op("Sub", dx, _spread(builder, shift, rank)), dscale, dbias]


def _normalized_axes(node: ir.Node, rank: int) -> tuple[list[int], list[int]]:
    """Return the axes before ``axis``, and the axes from ``axis`` on, which are normalized."""
    axis = node.attributes.get_int("axis", -1) % rank
    return list(range(axis)), list(range(axis, rank))


def _sum_leading(
    builder: NodeBuilder, value: ir.Value, axes: list[int], like: ir.Value
) -> ir.Value:
    """Sum over the leading axes, and reshape to the shape of the scale."""
    if axes:
        value = builder.op("ReduceSum", value, builder.integers(axes), keepdims=0)
    return builder.op("Reshape", value, builder.shape(like))


def lower_layer_norm_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace LayerNormalizationGrad with its formulas for the input, the scale and the bias.

    The formulas are:

    dx = inverse * (g - mean(g) - h * mean(g * h)), dscale = sum(dy * h), dbias = sum(dy).

    Here dy is the gradient of the output, inverse is 1 / standard deviation, h is (x - mean) *
    inverse, and g is dy * scale.
    """
    dy, x, scale, mean, inverse = take_inputs(node, 5)
    leading, normalized = _normalized_axes(node, require_rank(node, x))
    axes = builder.integers(normalized)
    h = builder.op("Mul", builder.op("Sub", x, mean), inverse)
    g = builder.op("Mul", dy, scale)
    flat = builder.op("ReduceMean", g, axes, keepdims=1)
    along = builder.op("ReduceMean", builder.op("Mul", g, h), axes, keepdims=1)
    dx = builder.op("Sub", builder.op("Sub", g, flat), builder.op("Mul", h, along))
    return [
        builder.op("Mul", dx, inverse),
        _sum_leading(builder, builder.op("Mul", dy, h), leading, scale),
        _sum_leading(builder, dy, leading, scale),
    ]


def lower_rms_norm(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace SimplifiedLayerNormalization, ONNX Runtime's RMS normalization, with its formula.

    The first output is x * inverse * scale, and the second output is inverse, where inverse is 1 /
    sqrt(mean(x**2) + epsilon) (arXiv 1910.07467).
    """
    x, scale = take_inputs(node, 2)
    _, normalized = _normalized_axes(node, require_rank(node, x))
    square = builder.op(
        "ReduceMean", builder.op("Mul", x, x), builder.integers(normalized), keepdims=1
    )
    epsilon = builder.number(node.attributes.get_float("epsilon", 1e-5), x.dtype)
    root = builder.op("Sqrt", builder.op("Add", square, epsilon))
    inverse = builder.op("Div", builder.number(1.0, x.dtype), root)
    return [builder.op("Mul", builder.op("Mul", x, inverse), scale), inverse]


def lower_rms_norm_grad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Replace SimplifiedLayerNormalizationGrad with formulas for the input's and scale's gradients.

    The formulas are:

    dx = inverse * (g - h * mean(g * h)), dscale = sum(dy * h).

    Here dy is the gradient of the output, inverse is 1 / sqrt(mean(x**2) + epsilon), h is x *
    inverse, and g is dy * scale.
    """
    dy, x, scale, inverse = take_inputs(node, 4)
    leading, normalized = _normalized_axes(node, require_rank(node, x))
    h = builder.op("Mul", x, inverse)
    g = builder.op("Mul", dy, scale)
    along = builder.op(
        "ReduceMean", builder.op("Mul", g, h), builder.integers(normalized), keepdims=1
    )
    dx = builder.op("Mul", builder.op("Sub", g, builder.op("Mul", h, along)), inverse)
    return [dx, _sum_leading(builder, builder.op("Mul", dy, h), leading, scale)]
