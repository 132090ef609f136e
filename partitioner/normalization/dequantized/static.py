"""Formulas of models in QOperator form, which compute with integers from end to end.

``quantize_static`` of ``onnxruntime.quantization`` writes this form.  Each operator becomes one of
floats between a DequantizeLinear before it and a QuantizeLinear after it (QDQ form).  So results
are rounded to the same numbers, and stay inside the same range, which a fused Relu relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, known_rank, take_input
from splitonnx.partitioner.normalization.dequantized.dynamic import find_settings
from splitonnx.partitioner.normalization.dequantized.moved import pair_moved
from splitonnx.partitioner.normalization.dequantized.weights import (
    FloatWeights,
    Settings,
    check_single,
    mark_version,
    refuse,
)
from splitonnx.partitioner.normalization.fused.operands import take_optional

_ONE_AXIS = 13
"""The first opset in which Softmax is computed over one axis."""

DIRECT = frozenset(
    {"DepthToSpace", "Expand", "MaxPool", "Pad", "Resize", "SpaceToDepth", "Split", "Tile"}
)
"""Operators that the tool applies to integers as they are, but that training needs as floats."""


def write_conv(builder: NodeBuilder, node: ir.Node, weights: FloatWeights) -> list[ir.Value]:
    """QLinearConv: a Conv whose bias has the product of both scales."""
    x = _read(builder, node, weights, 0)
    w = _read(builder, node, weights, 3, (0,))
    inputs = [x, w]
    if (bias := take_optional(node, 8)) is not None:
        inputs.append(_make_bias(node, weights, bias, 1.0))
    made = builder.ops("Conv", inputs, 1, _keep(node))[0]
    return [_round(builder, node, made, 6)]


def write_matmul(builder: NodeBuilder, node: ir.Node, weights: FloatWeights) -> list[ir.Value]:
    """QLinearMatMul: a MatMul."""
    left, right = _read(builder, node, weights, 0), _read(builder, node, weights, 3, (-1,))
    return [_round(builder, node, builder.op("MatMul", left, right), 6)]


def write_gemm(builder: NodeBuilder, node: ir.Node, weights: FloatWeights) -> list[ir.Value]:
    """QGemm: a Gemm whose bias is in units of the sums, and whose result may be a float."""
    axis = 0 if node.attributes.get_int("transB", 0) else 1
    inputs = [_read(builder, node, weights, 0), _read(builder, node, weights, 3, (axis,))]
    if (bias := take_optional(node, 6)) is not None:
        inputs.append(_make_bias(node, weights, bias, node.attributes.get_float("alpha", 1.0)))
    kept = {name: a for name, a in node.attributes.items() if name in ("alpha", "transA", "transB")}
    made = builder.ops("Gemm", inputs, 1, kept)[0]
    return [made if take_optional(node, 7) is None else _round(builder, node, made, 7)]


def _write_pair(kind: str) -> Callable[[NodeBuilder, ir.Node, FloatWeights], list[ir.Value]]:
    def write(builder: NodeBuilder, node: ir.Node, weights: FloatWeights) -> list[ir.Value]:
        left, right = _read(builder, node, weights, 0), _read(builder, node, weights, 3)
        return [_round(builder, node, builder.op(kind, left, right), 6)]

    return write


def _write_single(kind: str) -> Callable[[NodeBuilder, ir.Node, FloatWeights], list[ir.Value]]:
    def write(builder: NodeBuilder, node: ir.Node, weights: FloatWeights) -> list[ir.Value]:
        made = builder.ops(kind, [_read(builder, node, weights, 0)], 1, _keep(node))[0]
        return [_round(builder, node, made, 3)]

    return write


def write_softmax(builder: NodeBuilder, node: ir.Node, weights: FloatWeights) -> list[ir.Value]:
    """QLinearSoftmax: a Softmax, which up to opset 12 is over all axes from the given one."""
    given = node.attributes.get_int("opset", _ONE_AXIS)
    is_old, was_old = (node.version or _ONE_AXIS) < _ONE_AXIS, given < _ONE_AXIS
    axis, rank = node.attributes.get_int("axis", -1), known_rank(take_input(node))
    is_last = axis == -1 or (rank is not None and axis == rank - 1)
    if is_old != was_old and not is_last:
        raise refuse(node, f"it is the Softmax of opset {given} over axis {axis}")
    x = _read(builder, node, weights, 0)
    return [_round(builder, node, builder.op("Softmax", x, axis=axis), 3)]


def write_concat(builder: NodeBuilder, node: ir.Node, weights: FloatWeights) -> list[ir.Value]:
    """QLinearConcat: a Concat; the scale of the result comes before the inputs."""
    parts = [_read(builder, node, weights, index) for index in range(2, len(node.inputs), 3)]
    made = builder.ops("Concat", parts, 1, _keep(node))[0]
    return [_round(builder, node, made, 0)]


def write_where(builder: NodeBuilder, node: ir.Node, weights: FloatWeights) -> list[ir.Value]:
    """QLinearWhere: a Where."""
    first, second = _read(builder, node, weights, 1), _read(builder, node, weights, 4)
    return [_round(builder, node, builder.op("Where", take_input(node), first, second), 7)]


def write_direct(
    builder: NodeBuilder, node: ir.Node, weights: FloatWeights
) -> list[ir.Value] | None:
    """Apply an operator to floats instead of integers; ``None`` if its input is not quantized."""
    settings = find_settings(take_input(node))
    if settings is None or (len(node.outputs) > 1 and node.op_type != "Split"):
        return None
    check_single(node, settings)
    inputs = [weights.pair(builder, node, take_input(node), settings), *node.inputs[1:]]
    if node.op_type == "Pad":
        inputs = _fill(builder, node, weights, inputs, settings)
    if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise refuse(node, "what it puts outside its input is a number and not one of its integers")
    made = builder.ops(node.op_type, inputs, len(node.outputs), dict(node.attributes))
    return [_quantize(builder, node, value, settings.scale, settings.zero) for value in made]


def _fill(
    builder: NodeBuilder,
    node: ir.Node,
    weights: FloatWeights,
    inputs: list[ir.Value | None],
    settings: Settings,
) -> list[ir.Value | None]:
    """Return the inputs of a Pad of floats, which fills with what its integer stands for."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return inputs
    filling = take_optional(node, 2)
    if filling is None:  # the integer 0, which stands for 0.0 only if it is the zero point
        filling = ir.Value(const_value=ir.tensor(np.zeros((), np.int32)))
    constant = builder.tensor(ir.tensor(weights.compute(node, filling, settings)))
    return [*inputs[:2], constant, *inputs[3:]]


def _keep(node: ir.Node) -> dict[str, ir.Attr]:
    """Return a node's attributes that the operator of floats has, too.

    Raises:
        UnsupportedModel: the node has its channels on the last axis.
    """
    if node.attributes.get_int("channels_last", 0):
        raise refuse(node, "it has its channels on the last axis")
    return {name: a for name, a in node.attributes.items() if name != "channels_last"}


def _read(
    builder: NodeBuilder,
    node: ir.Node,
    weights: FloatWeights,
    index: int,
    axes: tuple[int, ...] = (),
) -> ir.Value:
    """Return the floats of the input at ``index``, whose scale and zero point come after it.

    Only a weight may have several scales, along the axis in ``axes``.
    """
    scale = take_input(node, index + 1)
    known = known_array(scale)
    if known is not None and known.ndim > 1 and known.size > 1:
        raise refuse(node, f"its scale has the shape {known.shape} instead of one axis")
    zero = take_optional(node, index + 2)
    settings = Settings(scale=scale, zero=zero, axes=axes or (-1,))
    if not axes:
        check_single(node, settings)
    return pair_moved(builder, node, weights, take_input(node, index), settings)


def _make_bias(node: ir.Node, weights: FloatWeights, bias: ir.Value, factor: float) -> ir.Value:
    """Return the floats of a bias stored as sums, whose scale is the product of two scales."""
    numbers, first, second = (
        known_array(value) for value in (bias, take_input(node, 1), take_input(node, 4))
    )
    if numbers is None or first is None or second is None:
        raise refuse(node, f"its bias '{bias.name}' or a scale is not stored in the model")
    scale = first.astype(np.float64).reshape(-1)[0] * second.astype(np.float64).reshape(-1)
    if first.size != 1 or scale.size not in (1, numbers.shape[-1]):
        raise refuse(node, "its scales do not fit its bias")
    return weights.store(node, bias, (numbers * scale * factor).astype(first.dtype))


def _round(builder: NodeBuilder, node: ir.Node, made: ir.Value, index: int) -> ir.Value:
    """Quantize a result with the scale of a node's input at ``index`` and the zero point after."""
    zero = take_optional(node, index + 1)
    return _quantize(builder, node, made, take_input(node, index), zero)


def _quantize(
    builder: NodeBuilder, node: ir.Node, made: ir.Value, scale: ir.Value, zero: ir.Value | None
) -> ir.Value:
    if zero is None:
        raise refuse(node, "its result has no zero point, so its type is not known")
    check_single(node, Settings(scale=scale, zero=zero))
    quantized = builder.op("QuantizeLinear", made, scale, zero)
    mark_version(quantized, node)
    return quantized


FORMULAS: Mapping[
    str, Callable[[NodeBuilder, ir.Node, FloatWeights], Sequence[ir.Value] | None]
] = {
    "QGemm": write_gemm,
    "QLinearAdd": _write_pair("Add"),
    "QLinearAveragePool": _write_single("AveragePool"),
    "QLinearConcat": write_concat,
    "QLinearConv": write_conv,
    "QLinearGlobalAveragePool": _write_single("GlobalAveragePool"),
    "QLinearLeakyRelu": _write_single("LeakyRelu"),
    "QLinearMatMul": write_matmul,
    "QLinearMul": _write_pair("Mul"),
    "QLinearSigmoid": _write_single("Sigmoid"),
    "QLinearSoftmax": write_softmax,
    "QLinearWhere": write_where,
}
"""Map each operator of QOperator form to the function that writes its formula."""
