"""Train quantized models in QDQ form with a straight-through gradient, and quantize them again.

Integers have no gradient.  In the training form, a term is therefore added to the output of each
pair of QuantizeLinear and DequantizeLinear.  The term is always zero but carries the gradient.  The
gradient of an element passes unchanged if the element is inside the range that the integers
represent, and is zero otherwise.  Scales and zero points are not trained.

A weight that is stored as integers and read by a DequantizeLinear is converted to a float parameter
with the same name.  A QuantizeLinear with the same scale quantizes this parameter, so the results
of the model do not change.  When the model is merged, the parameter is converted back to integers.
Biases stored as 32-bit integers get no QuantizeLinear; they become plain floats, even in the merged
model.

This module does not deal with cutting the model.  The formulas are those of QuantizeLinear-21 and
DequantizeLinear-21 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.gate.quantized_operators import STANDARD_TOOLS
from splitonnx.partitioner.graphs.builders import NodeBuilder, store_constant, take_input
from splitonnx.partitioner.graphs.traversals import find_dependents, walk_back
from splitonnx.partitioner.normalization.fused.packed_weights import unpack_weights

_LIFTED = "splitonnx.lifted"
"""Metadata key of a QuantizeLinear that was added for a weight stored as integers."""

NARROW = frozenset(
    ir.DataType[f"{kind}{bits}"] for kind in ("INT", "UINT") for bits in (4, 8, 16)
) | {kind for kind in ir.DataType if kind.name.startswith(("FLOAT8E4", "FLOAT8E5"))}
"""The types of weights that are stored as integers; 8-bit floats count as such."""

_SELECTING = frozenset(
    {"Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that may move integers between a QuantizeLinear and its DequantizeLinear."""

_KEPT = {"axis": 1, "block_size": 0}
"""Attributes that belong to a scale, and their defaults."""

INTEGER_ARITHMETIC = frozenset(STANDARD_TOOLS)
"""Operators that compute with integers throughout; a model made of them is in QOperator form."""

_ADVICE = "export the quantised model in QDQ format (QuantizeLinear and DequantizeLinear pairs)"
_TURN = "turn its weights back into floats with --dequantize (in Python dequantize=True)"


def lift_quantized(graph: ir.Graph) -> None:
    """Replace integer weights with float weights, in place.

    A weight is replaced only if it is read by MatMulNBits, or by a DequantizeLinear with a constant
    scale.  In the second case, the graph quantises the float weight, unless the integers had 32
    bits.
    """
    unpack_weights(graph)
    for node in [node for node in graph if _is(node, "DequantizeLinear")]:
        settings = _read_settings(node)
        if settings is None or not can_lift(node):
            continue
        source = store_constant(graph, take_input(node))
        lift = _lift_wide if source.dtype == ir.DataType.INT32 else _lift_narrow
        lift(graph, node, source, settings)


def can_lift(node: ir.Node) -> bool:
    """Return whether what a DequantizeLinear reads is a stored weight that can be a float weight.

    Only such nodes may read it, all with the same constant scale, unless its integers have 32 bits.
    """
    source = take_input(node)
    tensor = ir.convenience.get_const_tensor(source)
    if tensor is None or tensor.shape.rank() == 0 or _read_settings(node) is None:
        return False
    is_alike = all(_equals(node, use.node) for use in source.uses())
    return tensor.dtype == ir.DataType.INT32 or (tensor.dtype in NARROW and is_alike)


def _lift_narrow(
    graph: ir.Graph, node: ir.Node, source: ir.Value, settings: tuple[np.ndarray, np.ndarray]
) -> None:
    """Replace integers -> DequantizeLinear by floats -> QuantizeLinear -> DequantizeLinear."""
    tensor, name = source.const_value, source.name or ""
    assert tensor is not None
    floats = _dequantize(node, tensor.numpy(), settings)
    graph.initializers.pop(name)
    value = ir.Value(name=name, const_value=ir.tensor(floats, name=name))
    graph.register_initializer(value)
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is None:  # without one, QuantizeLinear would make it UINT8
        zeros = np.zeros(settings[0].shape, tensor.dtype.numpy())
        zero_point = ir.Value(
            name=f"{name}#zero_point", const_value=ir.tensor(zeros, dtype=tensor.dtype)
        )
        graph.register_initializer(zero_point)
    kept = {k: a for k, a in node.attributes.items() if k in _KEPT}
    quantize = ir.node(
        "QuantizeLinear", [value, node.inputs[1], zero_point], kept, name=f"{name}#quantize"
    )
    quantize.metadata_props[_LIFTED] = "1"
    quantize.outputs[0].name = f"{name}#quantized"
    graph.insert_before(node, quantize)
    for use in source.uses():
        use.node.replace_input_with(use.idx, quantize.outputs[0])


def _equals(node: ir.Node, other: ir.Node) -> bool:
    """Return whether two nodes dequantize with the same settings, as those of a tied weight do."""
    if not _is(other, "DequantizeLinear") or other.graph is not node.graph:
        return False
    pairs = [_read_settings(one) or () for one in (node, other)]
    kept = [[one.attributes.get_int(k, d) for k, d in _KEPT.items()] for one in (node, other)]
    same = len(pairs[0]) == len(pairs[1]) and all(map(np.array_equal, *pairs))
    return same and kept[0] == kept[1]


def _lift_wide(
    graph: ir.Graph, node: ir.Node, source: ir.Value, settings: tuple[np.ndarray, np.ndarray]
) -> None:
    tensor, result = source.const_value, node.outputs[0]
    assert tensor is not None
    name = result.name or ""
    value = ir.Value(const_value=ir.tensor(_dequantize(node, tensor.numpy(), settings)))
    result.name = None
    value.name = name
    assert value.const_value is not None
    value.const_value.name = name
    ir.convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    graph.register_initializer(value)
    if not source.uses():
        graph.initializers.pop(source.name or "")


def fold_quantized(graph: ir.Graph) -> None:
    """Convert the float weights from :func:`lift_quantized` back to integers, in place."""
    for node in [node for node in graph if _LIFTED in node.metadata_props]:
        value, quantized = node.inputs[0], node.outputs[0]
        settings = _read_settings(node)
        zero_point = node.inputs[2]
        if value is None or value.const_value is None or settings is None or zero_point is None:
            continue
        dtype = zero_point.dtype or ir.DataType.UINT8
        floats = value.const_value.numpy()
        low, high = _limit(dtype)
        scale, zero = (_spread(node, a, floats.shape) for a in settings)
        steps = floats / scale
        if not dtype.is_floating_point():
            steps = np.rint(steps) + zero.astype(floats.dtype)
        whole = np.clip(steps, low, high)
        integers = ir.tensor(whole.astype(dtype.numpy()), dtype=dtype, name=value.name)
        graph.initializers.pop(value.name or "")
        folded = ir.Value(name=value.name, const_value=integers)
        ir.convenience.replace_all_uses_with(quantized, folded)
        graph.remove(node, safe=True)
        graph.register_initializer(folded)


def pass_gradients(graph: ir.Graph, trained: Collection[str]) -> bool:
    """Add the straight-through gradient to quantised values that depend on trained parameters.

    Each pair of a QuantizeLinear and the DequantizeLinear after it is replaced in place.  If the
    pairs were kept, the optimizer of onnxruntime-training 1.19.2 would turn them into FakeQuant,
    which is not a standard operator and does not support per-channel scales.  The optimizer also
    rejects a QuantizeLinear that is not part of a pair.  Therefore, each QuantizeLinear that
    remains in use is replaced with its formula.

    Return whether any node was replaced.

    Raises:
        UnsupportedModel: integers that come from a parameter are used in computations before they
            are dequantised, or the scale of a pair is not a constant.
    """
    roots = [value for value in graph.inputs if value.name in trained]
    reached = find_dependents(graph, roots)
    _refuse_integer_arithmetic(graph, reached)
    pairs = [n for n in graph if _is(n, "DequantizeLinear") and n.inputs[0] in reached]
    for node in pairs:
        _straighten(node)
    makers = [n for n in graph if _is(n, "QuantizeLinear") and n.outputs[0].uses()]
    for node in makers:
        x = node.inputs[0]
        assert x is not None
        builder = NodeBuilder(f"{node.outputs[0].name}/formula")
        builder.replace(node, [_quantize(builder, node, builder.detach(x), whole=True)])
    return bool(pairs or makers)


def _refuse_integer_arithmetic(graph: ir.Graph, reached: Collection[ir.Value]) -> None:
    needed, _ = walk_back(graph.outputs)
    for node in [n for n in graph if n.op_type in INTEGER_ARITHMETIC and n in needed]:
        if not node.domain and any(value in reached for value in node.inputs):
            raise UnsupportedModel(
                f"node '{node.name}' ({node.op_type})",
                f"it computes with integers, as {STANDARD_TOOLS[node.op_type]} writes it, and they "
                "carry no gradient back to the parameters before it",
                f"{_TURN}, or freeze those parameters",
            )


def refuse_integer_model(graph: ir.Graph) -> None:
    """Raise an error if a graph without trained parameters computes with integers.

    In such a graph, the weights are integers, and none of them can be trained.

    Raises:
        UnsupportedModel: the graph contains an operator of :data:`INTEGER_ARITHMETIC`.
    """
    for node in graph:
        if node.op_type in INTEGER_ARITHMETIC and not node.domain:
            raise UnsupportedModel(
                f"node '{node.name}' ({node.op_type})",
                f"its weights are integers, as {STANDARD_TOOLS[node.op_type]} writes them, so "
                "nothing of this model can be trained",
                _TURN,
            )


def _straighten(node: ir.Node) -> None:
    """Replace a pair by its value for a detached x, plus x - detached x inside the range."""
    chain = [node, *_trace(node)]
    quantize = chain[-1]
    x = quantize.inputs[0]
    if x is None or not x.dtype or not x.dtype.is_floating_point():
        raise _refuse(node, "what they were made of is not known to be a float tensor")
    builder = NodeBuilder(f"{node.outputs[0].name}/straight")
    fixed = builder.detach(x)
    moved = builder.op("Sub", x, fixed)
    moved.type, moved.shape = x.type, x.shape
    if quantize.op_type == "DynamicQuantizeLinear":
        value = builder.op("DequantizeLinear", *builder.ops(quantize.op_type, [fixed], 3, {}))
    else:
        _refuse_other_settings(node, quantize)
        value = _quantize(builder, quantize, fixed, whole=False)
        zero = builder.number(0.0, x.dtype)
        moved = builder.op("Where", _find_inside(builder, quantize, fixed), moved, zero)
        moved.type, moved.shape = x.type, x.shape
    y = builder.op("Add", value, moved)
    for between in reversed(chain[1:-1]):
        y = builder.ops(between.op_type, [y, *between.inputs[1:]], 1, dict(between.attributes))[0]
    if node.outputs[0].dtype not in (None, x.dtype):
        y = builder.op("Cast", y, to=node.outputs[0].dtype.value)
    builder.replace(node, [y])


def _refuse_other_settings(node: ir.Node, quantize: ir.Node) -> None:
    one, other = (_read_settings(maker) for maker in (node, quantize))
    if one is None or other is None:
        raise _refuse_computed(node)
    if not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)):
        raise _refuse(node, f"node '{quantize.name}' made them with another scale or zero point")


def _quantize(builder: NodeBuilder, quantize: ir.Node, x: ir.Value, *, whole: bool) -> ir.Value:
    """Round x to a representable number; return it as integers with ``whole``, else as floats."""
    settings, dtype = _read_settings(quantize), _find_dtype(quantize)
    if settings is None:
        raise _refuse_computed(quantize)
    dims = [d if isinstance(d, int) else None for d in x.shape] if x.shape is not None else None
    spread = [_spread_for(quantize, array, dims) for array in settings]
    scale = builder.cast(builder.tensor(ir.tensor(spread[0])), x.dtype)
    steps = builder.op("Div", x, scale)
    if dtype.is_floating_point():
        steps = builder.op("Cast", steps, to=dtype.value)
        if whole:
            return steps
        assert x.dtype is not None
        return builder.op("Mul", builder.op("Cast", steps, to=x.dtype.value), scale)
    zero = spread[1].astype(settings[0].dtype)
    low, high = (builder.tensor(ir.tensor(limit - zero)) for limit in _limit(dtype))
    least, most = (builder.cast(limit, x.dtype) for limit in (low, high))
    steps = builder.op("Round", builder.op("Min", builder.op("Max", steps, least), most))
    if not whole:
        return builder.op("Mul", steps, scale)
    steps = builder.op("Add", steps, builder.cast(builder.tensor(ir.tensor(zero)), x.dtype))
    return builder.op("Cast", steps, to=dtype.value)


def _trace(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes before a DequantizeLinear, back to the one that quantised its input."""
    while True:
        value = node.inputs[0]
        maker = None if value is None else value.producer()
        if value is None or maker is None or maker.domain:
            raise _refuse(node, "they come from no QuantizeLinear")
        yield maker
        if maker.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            return
        if maker.op_type not in _SELECTING:
            raise _refuse(node, f"they come through node '{maker.name}' ({maker.op_type})")
        node = maker


def _refuse(node: ir.Node, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"node '{node.name}' ({node.op_type})",
        f"its integers depend on a trained parameter, but {reason}, so no gradient passes",
        _ADVICE,
    )


def _refuse_computed(node: ir.Node) -> UnsupportedModel:
    return UnsupportedModel(
        f"node '{node.name}' ({node.op_type})",
        "its scale or zero point is not a constant",
        "export the model with the scales that calibration found",
    )


def _find_inside(builder: NodeBuilder, quantize: ir.Node, x: ir.Value) -> ir.Value:
    """Return which elements are inside the range that the integers represent."""
    settings = _read_settings(quantize)
    dims = [d if isinstance(d, int) else None for d in x.shape] if x.shape is not None else None
    if settings is None:
        raise _refuse_computed(quantize)
    low, high = _limit(_find_dtype(quantize))
    scale, zero = settings
    bounds = []
    for limit in (low, high):
        bound = np.asarray((np.float64(limit) - zero.astype(np.float64)) * scale)
        bound = _spread_for(quantize, bound.astype(scale.dtype), dims)
        bounds.append(builder.cast(builder.tensor(ir.tensor(bound)), x.dtype))
    above = builder.op("GreaterOrEqual", x, bounds[0])
    return builder.op("And", above, builder.op("LessOrEqual", x, bounds[1]))


def _find_dtype(quantize: ir.Node) -> ir.DataType:
    dtype = quantize.outputs[0].dtype
    if dtype is not None:
        return dtype
    zero_point = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    declared = quantize.attributes.get_int("output_dtype", 0)
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype
    return ir.DataType(declared) if declared else ir.DataType.UINT8


def _limit(dtype: ir.DataType) -> tuple[float, float]:
    return float(dtype.min), float(dtype.max)


def _read_settings(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Read the scale and zero point as arrays of one shape; return ``None`` if not constant."""
    scale = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] else None
    if scale is None:
        return None
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is None:
        return scale.numpy(), np.zeros(tuple(scale.shape.numpy()), np.int32)
    zero = ir.convenience.get_const_tensor(zero_point)
    return None if zero is None else (scale.numpy(), zero.numpy())


def _dequantize(
    node: ir.Node, integers: np.ndarray, settings: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    scale, zero = (_spread(node, array, integers.shape) for array in settings)
    steps = integers.astype(np.float64) - zero.astype(np.float64)  # exact, as is the product
    floats: np.ndarray = (steps * scale.astype(np.float64)).astype(scale.dtype)
    return floats


def _spread(node: ir.Node, setting: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return _spread_for(node, setting, list(shape))


def _spread_for(node: ir.Node, setting: np.ndarray, dims: list[int | None] | None) -> np.ndarray:
    """Reshape a scale for broadcasting; it has one element in all, per channel, or per block."""
    if setting.size == 1:
        return setting.reshape(())
    if dims is None:
        raise UnsupportedModel(
            f"node '{node.name}' ({node.op_type})",
            "the rank of its input is not known",
            "export the model with shapes",
        )
    axis = node.attributes.get_int("axis", 1) % len(dims)
    block = node.attributes.get_int("block_size", 0)
    if not block:
        return setting.reshape([-1 if a == axis else 1 for a in range(len(dims))])
    repeated = np.repeat(setting, block, axis)
    extent = dims[axis]
    return repeated if extent is None else np.take(repeated, range(extent), axis)


def _is(node: ir.Node, kind: str) -> bool:
    return node.op_type == kind and node.domain in ("", "ai.onnx")
