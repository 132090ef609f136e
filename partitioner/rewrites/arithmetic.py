"""Rewrite arithmetic operators, Where and casts so that they can be differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, known_rank
from splitonnx.partitioner.graphs.traversals import is_float
from splitonnx.partitioner.rewrites.tangents import Tangent, bound_slope, follow_tangents

Values = Sequence[ir.Value]

_STRETCHED = "splitonnx.stretched"
"""Metadata key of a Where whose branches were expanded, even if shape inference cannot tell."""


def _list_inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def rewrite_sum(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Sum as a chain of Add nodes.

    onnxruntime-training has no gradient for Sum.
    """
    return [_add_up(builder, node)]


def rewrite_mean(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Mean as the sum of the inputs divided by their number.

    onnxruntime-training has no gradient for Mean.
    """
    total, count = _add_up(builder, node), len(node.inputs)
    first = _list_inputs(node)[0]
    return [total if count == 1 else builder.op("Div", total, builder.number(count, first.dtype))]


def _add_up(builder: NodeBuilder, node: ir.Node) -> ir.Value:
    return reduce(lambda a, b: builder.op("Add", a, b), _list_inputs(node))


def rewrite_mod(builder: NodeBuilder, node: ir.Node) -> Values:
    """Keep Mod and attach its derivatives with respect to its inputs x and y.

    The result of Mod is x - q * y, where q is the integer quotient of x and y.  Because q is
    treated as a constant, the derivatives are 1 with respect to x and -q with respect to y.
    onnxruntime-training has no gradient for Mod, so its derivatives are attached explicitly (see
    :mod:`tangents`).
    """
    x, y = _list_inputs(node)
    points = [builder.detach(value) for value in (x, y)]
    value = builder.ops("Mod", points, 1, dict(node.attributes))[0]
    whole = builder.op("Round", builder.op("Div", builder.op("Sub", points[0], value), points[1]))
    one = builder.number(1.0, x.dtype)
    slopes = [one, builder.op("Neg", whole)]
    tangents = [
        Tangent(source=source, point=point, slope=slope)
        for source, point, slope in zip((x, y), points, slopes, strict=True)
    ]
    return [follow_tangents(builder, value, tangents)]


def rewrite_pow(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Attach derivatives to Pow, x ** y, if those of onnxruntime-training are missing or wrong.

    If the exponent y is a single constant number other than 0, onnxruntime-training's gradient is
    used.  Otherwise, the derivative with respect to the base x is y * x ** (y - 1).  Unless y is a
    constant or an integer, the derivative with respect to y is x ** y * log(x), or 0 if x is not
    positive, because the logarithm of x does not exist then.

    The gradient builder of onnxruntime-training 1.19.2 accepts only floating-point exponents that
    are not parameters.  If the base is broadcast to the shape of the exponent, the builder does not
    sum the base's gradient over the broadcast axes.
    """
    x, y = _list_inputs(node)
    exponent = known_array(y)
    narrow = exponent is not None and exponent.ndim <= (known_rank(x) or 0)
    if exponent is not None and exponent.size == 1 and narrow and exponent.all():
        if y.dtype == x.dtype and exponent.ndim == 0:
            return None
        return [builder.op("Pow", x, builder.number(float(exponent.item()), x.dtype))]
    y, real = builder.cast(y, x.dtype), is_float(y) and exponent is None
    base, power = builder.detach(x), builder.detach(y)
    value = builder.op("Pow", base, power)
    tangents = [Tangent(source=x, point=base, slope=_slope_to_base(builder, base, power))]
    if real:
        slope = _slope_to_exponent(builder, base, value)
        tangents.append(Tangent(source=y, point=power, slope=slope))
    return [follow_tangents(builder, value, tangents)]


def _slope_to_base(builder: NodeBuilder, base: ir.Value, power: ir.Value) -> ir.Value:
    zero, one = builder.number(0.0, base.dtype), builder.number(1.0, base.dtype)
    slope = builder.op("Mul", power, builder.op("Pow", base, builder.op("Sub", power, one)))
    slope = builder.op("Where", builder.op("Equal", power, zero), zero, slope)
    return bound_slope(builder, slope, base.dtype)


def _slope_to_exponent(builder: NodeBuilder, base: ir.Value, value: ir.Value) -> ir.Value:
    positive = builder.op("Greater", base, builder.number(0.0, base.dtype))
    log = builder.op("Log", builder.op("Where", positive, base, builder.number(1.0, base.dtype)))
    return bound_slope(builder, builder.op("Mul", value, log), base.dtype)


def rewrite_where(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Expand the branches of Where to the shape of the result.

    If Where broadcasts a branch, the gradient builder of onnxruntime-training 1.19.2 fails to sum
    the branch's gradient over the broadcast axes.  A node is left unchanged if each branch is a
    constant or already has the shape of the result.
    """
    condition, *branches = _list_inputs(node)
    result = node.outputs[0].shape
    fitting = [known_array(v) is not None or _is_same(v.shape, result) for v in branches]
    if all(fitting) or _STRETCHED in node.metadata_props:
        return None
    whole = builder.op("Where", condition, *(builder.detach(value) for value in branches))
    whole.type, whole.shape = node.outputs[0].type, result
    shape = builder.shape(whole)
    stretched = [
        value if fits else builder.op("Expand", value, shape)
        for value, fits in zip(branches, fitting, strict=True)
    ]
    chosen = builder.op("Where", condition, *stretched)
    builder.nodes[-1].metadata_props[_STRETCHED] = "1"
    return [chosen]


def _is_same(own: ir.Shape | None, other: ir.Shape | None) -> bool:
    if own is None or other is None or len(own) != len(other):
        return False
    return all(_is_same_dim(a, b) for a, b in zip(own, other, strict=True))


def _is_same_dim(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    unknown = isinstance(a, ir.SymbolicDim) and a.value is None
    return a == b and not unknown


def rewrite_cast(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Remove a Cast if its input already has the requested dtype; leave other casts unchanged.

    The graph optimizer of onnxruntime-training 1.19.2 can fail on a Cast that changes nothing.

    Raises:
        UnsupportedModel: the requested dtype is a float of 8 bits or less, which has no gradient.
    """
    (x,) = _list_inputs(node)
    to = _require_wide(node, ir.DataType(node.attributes.get_int("to")))
    return [x] if x.dtype == to else None


def rewrite_cast_like(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite CastLike as a Cast to the dtype of its second input.

    onnxruntime-training has no gradient for CastLike.

    Raises:
        UnsupportedModel: the dtype of the second input is unknown, or it is a float of 8 bits or
            less, which has no gradient.
    """
    x, like = _list_inputs(node)
    if like.dtype is None:
        raise UnsupportedModel(
            f"node '{node.name}' (CastLike)",
            f"the dtype of '{like.name}' is not known",
            "export the model with a Cast instead",
        )
    return [builder.op("Cast", x, to=_require_wide(node, like.dtype).value)]


def _require_wide(node: ir.Node, dtype: ir.DataType) -> ir.DataType:
    """Raise an error for floats of 8 bits or less, in which ONNX Runtime computes no gradients."""
    if dtype.bitwidth <= 8:
        raise UnsupportedModel(
            f"node '{node.name}' ({node.op_type})",
            f"it casts what depends on a trained parameter to {dtype}, which carries no gradient",
            "export the model in float32, or quantized with QuantizeLinear",
        )
    return dtype
