"""Batch, layer and root-mean-square normalization in training, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, require_rank, take_inputs

Values = Sequence[ir.Value | None]


def _spread(draft: NodeBuilder, value: ir.Value, rank: int) -> ir.Value:
    """[C] to [C, 1, ...], so that it broadcasts along axis 1."""
    if rank == 2:
        return value
    spread = draft.op("Unsqueeze", value, draft.integers(range(1, rank - 1)))
    spread.type = value.type
    return spread


def lower_batch_norm(draft: NodeBuilder, node: ir.Node) -> Values:
    """Y, the new running statistics, the batch's mean and 1 / its deviation.

    The variance is the biased one, for the output and for the running statistic, as
    BatchNormalization-14 defines it.
    """
    x, scale, bias, mean, variance = take_inputs(node, 5)
    rank = require_rank(node, x)
    axes = draft.integers([0, *range(2, rank)])
    epsilon = draft.number(node.attributes.get_float("epsilon", 1e-5), x.dtype)
    momentum = node.attributes.get_float("momentum", 0.9)
    batch_mean = draft.op("ReduceMean", x, axes, keepdims=0)
    centred = draft.op("Sub", x, _spread(draft, batch_mean, rank))
    square = draft.op("Mul", centred, centred)
    batch_variance = draft.op("ReduceMean", square, axes, keepdims=0)
    deviation = draft.op("Sqrt", draft.op("Add", batch_variance, epsilon))
    inverse = draft.op("Div", draft.number(1.0, x.dtype), deviation)
    factor = _spread(draft, draft.op("Mul", scale, inverse), rank)
    y = draft.op("Add", draft.op("Mul", centred, factor), _spread(draft, bias, rank))

    def blend(old: ir.Value, new: ir.Value) -> ir.Value:
        kept = draft.op("Mul", old, draft.number(momentum, old.dtype))
        return draft.op("Add", kept, draft.op("Mul", new, draft.number(1 - momentum, old.dtype)))

    return [y, blend(mean, batch_mean), blend(variance, batch_variance), batch_mean, inverse]


def lower_batch_norm_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """With h = (x - mean) * inverse and n elements a channel:

    dbias = sum(dy), dscale = sum(dy * h), dx = scale * inverse * (dy - (dbias + h * dscale) / n).
    """
    dy, x, scale, mean, inverse = take_inputs(node, 5)
    rank = require_rank(node, x)
    axes = draft.integers([0, *range(2, rank)])
    centred = draft.op("Sub", x, _spread(draft, mean, rank))
    dbias = draft.op("ReduceSum", dy, axes, keepdims=0)
    weighted = draft.op("ReduceSum", draft.op("Mul", dy, centred), axes, keepdims=0)
    dscale = draft.op("Mul", weighted, inverse)
    count = draft.cast(draft.op("Div", draft.op("Size", x), draft.op("Size", scale)), x.dtype)
    # dx = factor * dy - slope * centred - shift: three passes over the elements instead of five
    factor = draft.op("Mul", scale, inverse)
    share = draft.op("Div", factor, count)
    slope = draft.op("Mul", share, draft.op("Mul", inverse, dscale))
    shift = draft.op("Mul", share, dbias)
    dx = draft.op("Mul", dy, _spread(draft, factor, rank))
    dx = draft.op("Sub", dx, draft.op("Mul", centred, _spread(draft, slope, rank)))
    return [draft.op("Sub", dx, _spread(draft, shift, rank)), dscale, dbias]


def _normalized_axes(node: ir.Node, rank: int) -> tuple[list[int], list[int]]:
    """Split the axes into those before ``axis`` and those normalized over."""
    axis = node.attributes.get_int("axis", -1) % rank
    return list(range(axis)), list(range(axis, rank))


def _sum_leading(draft: NodeBuilder, value: ir.Value, axes: list[int], like: ir.Value) -> ir.Value:
    """Sum over the leading axes, to the shape of the scale."""
    if axes:
        value = draft.op("ReduceSum", value, draft.integers(axes), keepdims=0)
    return draft.op("Reshape", value, draft.shape(like))


def lower_layer_norm_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """With h = (x - mean) * inverse and g = dy * scale:

    dx = inverse * (g - mean(g) - h * mean(g * h)), dscale = sum(dy * h), dbias = sum(dy).
    """
    dy, x, scale, mean, inverse = take_inputs(node, 5)
    leading, normalized = _normalized_axes(node, require_rank(node, x))
    axes = draft.integers(normalized)
    h = draft.op("Mul", draft.op("Sub", x, mean), inverse)
    g = draft.op("Mul", dy, scale)
    flat = draft.op("ReduceMean", g, axes, keepdims=1)
    along = draft.op("ReduceMean", draft.op("Mul", g, h), axes, keepdims=1)
    dx = draft.op("Sub", draft.op("Sub", g, flat), draft.op("Mul", h, along))
    return [
        draft.op("Mul", dx, inverse),
        _sum_leading(draft, draft.op("Mul", dy, h), leading, scale),
        _sum_leading(draft, dy, leading, scale),
    ]


def lower_rms_norm(draft: NodeBuilder, node: ir.Node) -> Values:
    """x / sqrt(mean(x**2) + epsilon) * scale (arXiv 1910.07467), and 1 / the root."""
    x, scale = take_inputs(node, 2)
    _, normalized = _normalized_axes(node, require_rank(node, x))
    square = draft.op("ReduceMean", draft.op("Mul", x, x), draft.integers(normalized), keepdims=1)
    epsilon = draft.number(node.attributes.get_float("epsilon", 1e-5), x.dtype)
    root = draft.op("Sqrt", draft.op("Add", square, epsilon))
    inverse = draft.op("Div", draft.number(1.0, x.dtype), root)
    return [draft.op("Mul", draft.op("Mul", x, inverse), scale), inverse]


def lower_rms_norm_grad(draft: NodeBuilder, node: ir.Node) -> Values:
    """With h = x * inverse and g = dy * scale: dx = inverse * (g - h * mean(g * h))."""
    dy, x, scale, inverse = take_inputs(node, 4)
    leading, normalized = _normalized_axes(node, require_rank(node, x))
    h = draft.op("Mul", x, inverse)
    g = draft.op("Mul", dy, scale)
    along = draft.op("ReduceMean", draft.op("Mul", g, h), draft.integers(normalized), keepdims=1)
    dx = draft.op("Mul", draft.op("Sub", g, draft.op("Mul", h, along)), inverse)
    return [dx, _sum_leading(draft, draft.op("Mul", dy, h), leading, scale)]
