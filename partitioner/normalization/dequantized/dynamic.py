"""Formulas of what ``quantize_dynamic`` writes: integer weights and rounded activations.

``quantize_dynamic`` is a function of ``onnxruntime.quantization``.  Its models compute the scale of
an activation from the whole batch.  The formulas leave that rounding out, unless they are asked to
keep it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.gate.fused_operators import DOMAIN
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, take_input
from splitonnx.partitioner.normalization.dequantized.moved import can_move, pair_moved
from splitonnx.partitioner.normalization.dequantized.weights import (
    MOVING,
    FloatWeights,
    Settings,
    check_single,
    is_channelwise,
    refuse,
)
from splitonnx.partitioner.normalization.fused.operands import take_optional

_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_ATTENTION = ("do_rotary", "mask_filter_value", "num_heads", "scale", "unidirectional")
_ENDS = frozenset({"ReduceMax", "ReduceMin"})
_RANGING = _ENDS | {"Abs", "Div", "Max", "Mul", "Sub"}
"""Operators with which older tools compute a scale from the range of an activation."""
_TABLES = range(2, 7)
"""The inputs of QEmbedLayerNormalization that are stored as integers."""


def replace_integer_product(node: ir.Node, weights: FloatWeights) -> None:
    """Replace MatMulInteger or ConvInteger, a Cast, and a Mul by two scales, in place.

    ``Mul(Cast(A @ B), scale of A * scale of B)`` becomes the product of the floats of A and B.
    """
    factors = list(_list_factors(node))
    if not factors:
        raise refuse(node, "no Cast and Mul after it multiply its sums by the scales of its inputs")
    for factor in factors:
        builder = NodeBuilder(f"{factor.node.outputs[0].name or factor.node.name}/float")
        first, second = _order_scales(node, factor.scales)
        settings = check_single(node, _take(node, first, 2))
        x = find_floats(builder, node, weights, take_input(node), settings)
        kind, kept, settings = "MatMul", {}, _take(node, second, 3)
        if node.op_type == "ConvInteger":
            kind = "Conv"
            kept = {name: node.attributes[name] for name in _CONV if name in node.attributes}
            settings = _take(node, second, 3, (0,))
            _refuse_channels(node, second)
        w = find_floats(builder, node, weights, take_input(node, 1), settings)
        made = builder.ops(kind, [x, w], 1, kept)[0]
        if factor.bias is not None:
            made = builder.op("Add", made, builder.op("Reshape", factor.bias, factor.shape))
        builder.replace(factor.node, [made])


def _take(node: ir.Node, scale: ir.Value, zero: int, axes: tuple[int, ...] = (-1,)) -> Settings:
    return Settings(scale=scale, zero=take_optional(node, zero), axes=axes)


def _refuse_channels(node: ir.Node, scale: ir.Value) -> None:
    """Check that the sums are multiplied by a scale for all channels, or along the second axis."""
    array = known_array(scale)
    if array is not None and array.size > 1 and array.shape[-2:] != (1, 1):
        raise refuse(node, f"its scale of shape {array.shape} is not one for each channel")


@dataclass(frozen=True, kw_only=True)
class _Factor:
    """A Mul that multiplies sums of integers by two scales.

    ``bias`` was added to the sums, in units of the product of the scales, in the shape ``shape``.
    """

    node: ir.Node
    scales: tuple[ir.Value, ir.Value]
    bias: ir.Value | None
    shape: ir.Value | None


def _list_factors(node: ir.Node) -> Iterator[_Factor]:
    """Yield each Mul that multiplies the sums of a node, or these and a bias, by two scales."""
    for use in node.outputs[0].uses():
        if use.node.op_type == "Cast":
            yield from _list_products(use.node, None, None)
        elif use.node.op_type == "Add" and (found := _find_bias(use.node.inputs[1 - use.idx])):
            casts = [after.node for after in use.node.outputs[0].uses()]
            for cast in [after for after in casts if after.op_type == "Cast"]:
                yield from _list_products(cast, *found)


def _list_products(
    cast: ir.Node, bias: ir.Value | None, shape: ir.Value | None
) -> Iterator[_Factor]:
    for use in cast.outputs[0].uses():
        if use.node.op_type != "Mul" or use.node.domain:
            continue
        maker = _find_maker(use.node.inputs[1 - use.idx], "Mul")
        if maker is not None:
            scales = (take_input(maker), take_input(maker, 1))
            yield _Factor(node=use.node, scales=scales, bias=bias, shape=shape)


def _find_bias(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Return the floats of a bias that older tools write as integers, and the shape it gets.

    These tools write ``Reshape(Cast(Floor(bias / scale)), shape)``.
    """
    reshape = _find_maker(value, "Reshape")
    maker = reshape
    for kind in ("Cast", "Floor", "Div"):
        maker = None if maker is None else _find_maker(maker.inputs[0], kind)
    if reshape is None or maker is None:
        return None
    return take_input(maker), take_input(reshape, 1)


def _find_maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    maker = None if value is None else value.producer()
    return maker if maker is not None and maker.op_type == kind and not maker.domain else None


def _order_scales(node: ir.Node, scales: tuple[ir.Value, ir.Value]) -> tuple[ir.Value, ir.Value]:
    """Return the scale of a node's first input, and that of its second."""
    first, second = (find_settings(take_input(node, index)) for index in (0, 1))
    known = [None if one is None else one.scale for one in (first, second)]
    for pair in (scales, scales[::-1]):
        if any(have is not None for have in known) and all(
            have is None or have is want for have, want in zip(known, pair, strict=True)
        ):
            _check_zero(node, first, 2)
            _check_zero(node, second, 3)
            return pair
    if known == [None, None]:  # both are stored in the model, and the scales multiply all the same
        settings = Settings(scale=scales[0], zero=None)
        return scales[::-1] if is_channelwise(settings) else scales
    raise refuse(node, "its sums are multiplied by other scales than those of its inputs")


def _check_zero(node: ir.Node, settings: Settings | None, index: int) -> None:
    if settings is not None and take_optional(node, index) is not settings.zero:
        raise refuse(node, f"its input {index} is not the zero point with which integers were made")


def find_settings(value: ir.Value) -> Settings | None:
    """Return the scale and zero point with which a value was quantized, or ``None``."""
    maker = value.producer()
    while maker is not None and maker.op_type in MOVING and not maker.domain:
        value = take_input(maker)
        maker = value.producer()
    if maker is None or maker.domain:
        return None
    if maker.op_type == "DynamicQuantizeLinear":
        return Settings(scale=maker.outputs[1], zero=maker.outputs[2])
    if maker.op_type == "QuantizeLinear":
        axis = maker.attributes.get_int("axis", 1)
        return Settings(scale=take_input(maker, 1), zero=take_optional(maker, 2), axes=(axis,))
    return None


def find_floats(
    builder: NodeBuilder, node: ir.Node, weights: FloatWeights, value: ir.Value, settings: Settings
) -> ir.Value:
    """Return the floats that integers stand for: a weight, or what the integers were made of.

    Operators between the two that move elements are repeated for floats.
    """
    maker = value.producer()
    if known_array(value) is not None:
        return weights.make(node, value, settings)
    if maker is None or maker.domain:
        return weights.pair(builder, node, value, settings)
    is_dynamic = maker.op_type == "DynamicQuantizeLinear" or _is_ranged(maker)
    if is_dynamic and not weights.is_rounding:
        return take_input(maker)
    if maker.op_type in MOVING and not is_channelwise(settings):
        x = find_floats(builder, node, weights, take_input(maker), settings)
        kept = dict(maker.attributes)
        return builder.ops(maker.op_type, [x, *maker.inputs[1:]], 1, kept)[0]
    return pair_moved(builder, node, weights, value, settings)


def _is_ranged(maker: ir.Node) -> bool:
    """Return whether a QuantizeLinear has a scale computed from the range of its input.

    ``quantize_dynamic`` writes this for opset 10, which has no DynamicQuantizeLinear.
    """
    if maker.op_type != "QuantizeLinear":
        return False
    x, pending, ends = take_input(maker), [take_input(maker, 1)], set()
    while pending:
        node = pending.pop().producer()
        if node is None or node.domain or node.op_type not in _RANGING:
            continue
        if node.op_type in _ENDS and take_input(node) is x:
            ends.add(node.op_type)
            continue
        pending += [value for value in node.inputs if value is not None]
    return ends == _ENDS


def write_dequantize(
    builder: NodeBuilder, node: ir.Node, weights: FloatWeights
) -> list[ir.Value] | None:
    """Read from a float table what is read from a table of integers and then dequantized.

    The table stays quantized (in QDQ form) in models of ``quantize_static``, and where its scale
    has several elements.  Return ``None`` if the node dequantizes anything else.
    """
    axes = (node.attributes.get_int("axis", 1),)
    value, settings = take_input(node), _take(node, take_input(node, 1), 2, axes)
    if not can_move(value, settings):
        weights.keep(node)
        return None
    if weights.is_static or is_channelwise(settings):
        return [pair_moved(builder, node, weights, value, settings)]
    return [find_floats(builder, node, weights, value, settings)]


def write_product(builder: NodeBuilder, node: ir.Node, weights: FloatWeights) -> list[ir.Value]:
    """MatMulIntegerToFloat: ``floats of A @ floats of B + bias``."""
    left, right = take_input(node), take_input(node, 1)
    settings = [_take(node, take_input(node, 2), 4), _take(node, take_input(node, 3), 5)]
    first = find_floats(builder, node, weights, left, check_single(node, settings[0]))
    second = find_floats(builder, node, weights, right, settings[1])
    return [_add(builder, builder.op("MatMul", first, second), take_optional(node, 6))]


def write_dynamic_product(
    builder: NodeBuilder, node: ir.Node, weights: FloatWeights
) -> list[ir.Value]:
    """DynamicQuantizeMatMul: ``A @ floats of B + bias``."""
    x = _round(builder, weights, take_input(node))
    settings = _take(node, take_input(node, 2), 3)
    second = find_floats(builder, node, weights, take_input(node, 1), settings)
    return [_add(builder, builder.op("MatMul", x, second), take_optional(node, 4))]


def _round(builder: NodeBuilder, weights: FloatWeights, x: ir.Value) -> ir.Value:
    if not weights.is_rounding:
        return x
    return builder.op("DequantizeLinear", *builder.ops("DynamicQuantizeLinear", [x], 3, {}))


def _add(builder: NodeBuilder, product: ir.Value, bias: ir.Value | None) -> ir.Value:
    return product if bias is None else builder.op("Add", product, bias)


def write_lstm(builder: NodeBuilder, node: ir.Node, weights: FloatWeights) -> Sequence[ir.Value]:
    """DynamicQuantizeLSTM: an LSTM whose weights have their last two axes swapped."""
    made = [
        weights.make(
            node,
            take_input(node, index),
            _take(node, take_input(node, scale), scale + 1, (0, 2)),
            order=(0, 2, 1),
        )
        for index, scale in ((1, 8), (2, 10))
    ]
    inputs = [take_input(node), *made, *node.inputs[3:8]]
    while inputs[-1] is None:
        inputs.pop()
    return builder.ops("LSTM", inputs, len(node.outputs), dict(node.attributes))


def write_attention(
    builder: NodeBuilder, node: ir.Node, weights: FloatWeights
) -> Sequence[ir.Value]:
    """QAttention: ONNX Runtime's Attention with floats, which is itself replaced later."""
    settings = [_take(node, take_input(node, 3), 6), _take(node, take_input(node, 4), 7)]
    x = find_floats(builder, node, weights, take_input(node), check_single(node, settings[0]))
    w = find_floats(builder, node, weights, take_input(node, 1), settings[1])
    inputs = [x, w, *(take_optional(node, index) for index in (2, 5, 8))]
    return _build_fused(builder, node, "Attention", inputs, _ATTENTION)


def write_embedding(
    builder: NodeBuilder, node: ir.Node, weights: FloatWeights
) -> Sequence[ir.Value]:
    """QEmbedLayerNormalization: EmbedLayerNormalization with float tables."""
    made: list[ir.Value | None] = []
    for place, index in enumerate(_TABLES):
        integers, scale = take_optional(node, index), take_optional(node, 8 + place)
        if integers is None or scale is None:
            made.append(None)
            continue
        made.append(weights.make(node, integers, _take(node, scale, 13 + place)))
    inputs = [*node.inputs[:2], *made, take_optional(node, 7)]
    return _build_fused(builder, node, "EmbedLayerNormalization", inputs, ("epsilon",))


def _build_fused(
    builder: NodeBuilder,
    node: ir.Node,
    kind: str,
    inputs: list[ir.Value | None],
    attributes: Sequence[str],
) -> Sequence[ir.Value]:
    """Append a fused operator of ONNX Runtime, with those attributes of a node that are named."""
    while inputs[-1] is None:
        inputs.pop()
    kept = {name: node.attributes[name] for name in attributes if name in node.attributes}
    made = builder.ops(kind, inputs, len(node.outputs), kept)
    maker = made[0].producer()
    assert maker is not None
    maker.domain = DOMAIN
    return made
