"""Upgrade nodes of opsets 1 to 20 to operators of an opset from 18 to 21.

:data:`UPGRADES` maps an operator, together with the opset that changed it, to a small function that
converts an older node.  The function either edits the node in place and returns ``None``, or
returns replacements for the node's outputs, computed by operators of opset 18 to 21.  Changes to
operators that only added types or optional features are not listed.  The sources are the operators'
changelog and onnx.defs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims, known_rank

Adapter = Callable[[NodeBuilder, ir.Node], Sequence[ir.Value | None] | None]


def _set(node: ir.Node, name: str, value: int | float | str) -> None:
    node.attributes[name] = ir.convenience.convert_attribute(name, value)


def _append_inputs(node: ir.Node, *values: ir.Value | None) -> None:
    """Set the inputs after the first to ``values``, without ``None`` at the end."""
    kept = list(values)
    while kept and kept[-1] is None:
        kept.pop()
    node.resize_inputs(1 + len(kept))
    for index, value in enumerate(kept):
        node.replace_input_with(1 + index, value)


def _pop_ints(node: ir.Node, name: str) -> list[int] | None:
    attribute = node.attributes.pop(name, None)
    return None if attribute is None else list(attribute.as_ints())


def refuse(node: ir.Node, reason: str, advice: str = "") -> UnsupportedModel:
    """Return the error for a node that cannot be converted to another opset.

    ``reason`` states what prevents the conversion, and ``advice`` how the user can avoid the error.
    """
    return UnsupportedModel(
        f"node '{node.name}' ({node.op_type} of opset {node.version})",
        reason,
        advice or "export the model with opset 18 to 21",
    )


def _drop(*names: str) -> Adapter:
    """Remove attributes that only affected speed, or that the next version implies."""

    def adapt(builder: NodeBuilder, node: ir.Node) -> None:
        for name in names:
            node.attributes.pop(name, None)

    return adapt


def _rename(kind: str) -> Adapter:
    def adapt(builder: NodeBuilder, node: ir.Node) -> None:
        node.op_type = kind

    return adapt


def _default(**values: int | float | str) -> Adapter:
    """Set attributes to defaults that the next version changed or removed."""

    def adapt(builder: NodeBuilder, node: ir.Node) -> None:
        for name, value in values.items():
            if name not in node.attributes:
                _set(node, name, value)

    return adapt


def _round(name: str) -> Adapter:
    """Convert an attribute that was a float and became an integer."""

    def adapt(builder: NodeBuilder, node: ir.Node) -> None:
        if name in node.attributes:
            _set(node, name, round(node.attributes[name].as_float()))

    return adapt


def _axes_to_input(builder: NodeBuilder, node: ir.Node) -> None:
    """Turn the axes of Squeeze, Unsqueeze and ReduceX into an input; no axes means all axes."""
    axes = _pop_ints(node, "axes")
    _append_inputs(node, builder.integers(axes) if axes else None)


def _spread_legacy(builder: NodeBuilder, node: ir.Node) -> None:
    """Align the second operand, which before opset 7 was broadcast from dimension ``axis`` on."""
    broadcast = node.attributes.pop("broadcast", None)
    axis = node.attributes.pop("axis", None)
    if broadcast is None or axis is None or not broadcast.as_int() or axis.as_int() < 0:
        return
    _align(builder, node, axis.as_int())


def _align(builder: NodeBuilder, node: ir.Node, axis: int) -> None:
    """Unsqueeze the second operand until its first dimension is at ``axis`` of the first."""
    x, other = node.inputs[:2]
    ranks = [known_rank(value) if value is not None else None for value in (x, other)]
    if ranks[0] is None or ranks[1] is None:
        raise refuse(node, "it broadcasts along an axis, and the rank of an input is not known")
    missing = ranks[0] - axis - ranks[1]
    if missing > 0:
        axes = builder.integers(range(ranks[1], ranks[1] + missing))
        node.replace_input_with(1, builder.op("Unsqueeze", other, axes))


def _spread_slope(builder: NodeBuilder, node: ir.Node) -> None:
    """Align PRelu's slope, which has one element per channel, for broadcasting since opset 7."""
    dims = known_dims(node.inputs[1]) if node.inputs[1] is not None else None
    if dims is not None and len(dims) == 1 and dims[0] != 1:
        _align(builder, node, 1)


def _mode_batchnorm(builder: NodeBuilder, node: ir.Node) -> None:
    """Replace ``is_test``, which up to opset 6 selected the statistics of BatchNormalization."""
    testing = node.attributes.pop("is_test", None)
    if (testing is None or not testing.as_int()) and len(node.outputs) == 1:
        node.resize_outputs(3)  # in opsets 7 to 13, a node with these outputs is in training mode


def _unfold_batchnorm(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value] | None:
    """Expand BatchNormalization with ``spatial=0``, whose statistics are per feature."""
    spatial = node.attributes.pop("spatial", None)
    x = node.inputs[0]
    if spatial is None or spatial.as_int() or (x is not None and known_rank(x) == 2):
        return None
    if len(node.outputs) > 1:
        raise refuse(node, "it trains with spatial=0, which newer opsets do not have")
    _, scale, bias, mean, variance = node.inputs
    assert x is not None
    epsilon = builder.number(
        node.attributes.get_float("epsilon", 1e-5), x.dtype or ir.DataType.FLOAT
    )
    deviation = builder.op("Sqrt", builder.op("Add", variance, epsilon))
    scaled = builder.op("Mul", builder.op("Sub", x, mean), builder.op("Div", scale, deviation))
    return [builder.op("Add", scaled, bias)]


def _declare_batchnorm(builder: NodeBuilder, node: ir.Node) -> None:
    """Set ``training_mode``, which is new in opset 14, and remove the saved statistics."""
    if len(node.outputs) > 1:
        _set(node, "training_mode", 1)
        if any(v.uses() or v.is_graph_output() for v in node.outputs[3:]):
            raise refuse(node, "its saved statistics are used, which newer opsets do not have")
        node.resize_outputs(3)


def _mode_dropout(builder: NodeBuilder, node: ir.Node) -> None:
    """Replace ``is_test``: up to opset 6, Dropout was active unless it was set."""
    testing = node.attributes.pop("is_test", None)
    if testing is None or not testing.as_int():
        node.metadata_props[_WAS_ON] = "1"


_WAS_ON = "splitonnx.on"


def _feed_dropout(builder: NodeBuilder, node: ir.Node) -> None:
    ratio = node.attributes.pop("ratio", None)
    rate = 0.5 if ratio is None else ratio.as_float()
    on = node.metadata_props.pop(_WAS_ON, None)
    _append_inputs(
        node,
        builder.number(rate, ir.DataType.FLOAT),
        builder.tensor(ir.tensor(True)) if on else None,
    )


def _name_cast(builder: NodeBuilder, node: ir.Node) -> None:
    """Convert ``to``, which was the name of a type, to the type's number."""
    name = node.attributes["to"].as_string()
    try:
        _set(node, "to", ir.DataType[name.upper()].value)
    except KeyError as error:
        raise refuse(node, f"it casts to '{name}', which is not a type") from error


def _feed_clip(builder: NodeBuilder, node: ir.Node) -> None:
    x = node.inputs[0]
    assert x is not None
    bounds = [node.attributes.pop(name, None) for name in ("min", "max")]
    dtype = x.dtype or ir.DataType.FLOAT
    _append_inputs(node, *(builder.number(b.as_float(), dtype) if b else None for b in bounds))


def _feed_pad(builder: NodeBuilder, node: ir.Node) -> None:
    pads = _pop_ints(node, "pads") or []
    value = node.attributes.pop("value", None)
    x = node.inputs[0]
    assert x is not None
    number = None
    if value is not None and value.as_float() != 0.0:
        number = builder.number(value.as_float(), x.dtype or ir.DataType.FLOAT)
    _append_inputs(node, builder.integers(pads), number)


def _name_pads(builder: NodeBuilder, node: ir.Node) -> None:
    node.attributes["pads"] = ir.AttrInt64s("pads", _pop_ints(node, "paddings") or [])


def _feed_reshape(builder: NodeBuilder, node: ir.Node) -> None:
    _append_inputs(node, builder.integers(_pop_ints(node, "shape") or []))


def _feed_slice(builder: NodeBuilder, node: ir.Node) -> None:
    starts, ends, axes = (_pop_ints(node, name) for name in ("starts", "ends", "axes"))
    indices = [builder.integers(starts or []), builder.integers(ends or [])]
    _append_inputs(node, *indices, builder.integers(axes) if axes else None)


def _feed_split(builder: NodeBuilder, node: ir.Node) -> None:
    sizes = _pop_ints(node, "split")
    if sizes:
        _append_inputs(node, builder.integers(sizes))


def _count_split(builder: NodeBuilder, node: ir.Node) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        _set(node, "num_outputs", len(node.outputs))


def _feed_topk(builder: NodeBuilder, node: ir.Node) -> None:
    _append_inputs(node, builder.integers([node.attributes.pop("k").as_int()]))


def _feed_dft(builder: NodeBuilder, node: ir.Node) -> None:
    axis = node.attributes.pop("axis", None)
    length = node.inputs[1] if len(node.inputs) > 1 else None
    _append_inputs(node, length, builder.integer(1 if axis is None else axis.as_int()))


def _rename_sampling(builder: NodeBuilder, node: ir.Node) -> None:
    mode = node.attributes.get_string("mode", "bilinear")
    _set(node, "mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


def _spread_groups(builder: NodeBuilder, node: ir.Node) -> None:
    """Repeat GroupNormalization's scale and bias for each channel of a group, as of opset 21."""
    x = node.inputs[0]
    dims = known_dims(x) if x is not None else None
    groups = node.attributes["num_groups"].as_int()
    if dims is None or len(dims) < 2 or dims[1] is None:
        raise refuse(node, "the number of its channels is not known")
    each = builder.integers([1, dims[1] // groups])
    for index in (1, 2):
        column = builder.op("Unsqueeze", node.inputs[index], builder.integers([1]))
        spread = builder.op("Expand", column, each)
        node.replace_input_with(index, builder.op("Reshape", spread, builder.integers([-1])))


def _soften(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value] | None:
    """Flatten all dimensions from ``axis`` on, over which older versions of Softmax normalised."""
    x = node.inputs[0]
    assert x is not None
    axis, dims = node.attributes.get_int("axis", 1), known_dims(x)
    if dims is not None:
        axis += len(dims) if axis < 0 else 0
        wide = [index for index in range(axis, len(dims)) if dims[index] != 1]
        if len(wide) <= 1:
            chosen = wide[0] if wide else len(dims) - 1
            _set(node, "axis", -1 if chosen == len(dims) - 1 else chosen)
            return None
    flat = builder.op(node.op_type, builder.op("Flatten", x, axis=axis), axis=-1)
    return [builder.op("Reshape", flat, builder.shape(x))]


def _scale_upsample(builder: NodeBuilder, node: ir.Node) -> None:
    height, width = (node.attributes.pop(f"{d}_scale").as_float() for d in ("height", "width"))
    node.attributes["scales"] = ir.AttrFloat32s("scales", [1.0, 1.0, height, width])
    if node.attributes.get_string("mode", "nearest") == "bilinear":
        _set(node, "mode", "linear")


def _feed_upsample(builder: NodeBuilder, node: ir.Node) -> None:
    scales = np.array(node.attributes.pop("scales").as_floats(), np.float32)
    _append_inputs(node, builder.tensor(ir.tensor(scales)))


def _resize(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value]:
    """Replace Upsample, and Resize of opset 10, which rounded up when it downsampled."""
    x, scales = node.inputs[:2]
    assert x is not None
    assert scales is not None
    mode = node.attributes.get_string("mode", "nearest")
    if mode != "nearest" or node.op_type == "Upsample":
        return [_write_resize(builder, x, scales, mode, "floor")]
    tensor = ir.convenience.get_const_tensor(scales)
    if tensor is None:
        raise refuse(
            node, "its scales are computed, and rounding depends on them", "export with opset 11 up"
        )
    numbers = tensor.numpy()
    result = x
    for rounding, part in (("floor", np.maximum(numbers, 1)), ("ceil", np.minimum(numbers, 1))):
        if (part != 1).any():
            result = _write_resize(builder, result, builder.tensor(ir.tensor(part)), mode, rounding)
    return [result]


def _write_resize(
    builder: NodeBuilder, x: ir.Value, scales: ir.Value, mode: str, rounding: str
) -> ir.Value:
    return builder.op(
        "Resize", x, None, scales, mode=mode, nearest_mode=rounding,
        coordinate_transformation_mode="asymmetric",
    )  # fmt: skip


def _clear_resize(builder: NodeBuilder, node: ir.Node) -> None:
    """Remove empty tensors, which stood for missing inputs in opset 11."""
    for index, value in enumerate(node.inputs):
        if index and value is not None:
            tensor = ir.convenience.get_const_tensor(value)
            if (tensor is not None and tensor.size == 0) or known_dims(value) == [0]:
                node.replace_input_with(index, None)


def _refuse_change(builder: NodeBuilder, node: ir.Node) -> None:
    raise refuse(node, "its meaning changed, and no newer operator has the old one")


_BINARY = ["Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor"]
_REDUCTIONS = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare"]

UPGRADES: Mapping[tuple[str, int], Adapter] = {
    **{(kind, 7): _spread_legacy for kind in _BINARY},
    **{(f"Reduce{kind}", 18): _axes_to_input for kind in _REDUCTIONS},
    ("BatchNormalization", 7): _mode_batchnorm,
    ("BatchNormalization", 9): _unfold_batchnorm,
    ("BatchNormalization", 14): _declare_batchnorm,
    ("Cast", 6): _name_cast,
    ("Clip", 11): _feed_clip,
    ("Concat", 4): _default(axis=1),
    ("DFT", 20): _feed_dft,
    ("Dropout", 7): _mode_dropout,
    ("Dropout", 12): _feed_dropout,
    ("GRU", 3): _default(direction="forward"),
    ("GRU", 7): _drop("output_sequence"),
    ("Gemm", 7): _drop("broadcast"),
    ("GlobalLpPool", 2): _round("p"),
    ("GridSample", 20): _rename_sampling,
    ("GroupNormalization", 21): _spread_groups,
    ("Hardmax", 13): _soften,
    ("LSTM", 7): _drop("output_sequence"),
    ("LogSoftmax", 13): _soften,
    ("LpPool", 2): _round("p"),
    ("PRelu", 7): _spread_slope,
    ("Pad", 2): _name_pads,
    ("Pad", 11): _feed_pad,
    ("RNN", 7): _drop("output_sequence"),
    ("ReduceSum", 13): _axes_to_input,
    ("Reshape", 5): _feed_reshape,
    ("Resize", 11): _resize,
    ("Resize", 13): _clear_resize,
    ("RoiAlign", 16): _default(coordinate_transformation_mode="output_half_pixel"),
    ("Scan", 9): _refuse_change,
    ("Scatter", 11): _rename("ScatterElements"),
    ("Selu", 6): _default(alpha=1.6732, gamma=1.0507),
    ("Slice", 10): _feed_slice,
    ("Softmax", 13): _soften,
    ("Split", 2): _default(axis=0),
    ("Split", 13): _feed_split,
    ("Split", 18): _count_split,
    ("Squeeze", 13): _axes_to_input,
    ("Tile", 6): _refuse_change,
    ("TopK", 10): _feed_topk,
    ("Unsqueeze", 13): _axes_to_input,
    ("Upsample", 7): _scale_upsample,
    ("Upsample", 9): _feed_upsample,
    ("Upsample", 10): _resize,
}
"""Maps (operator, opset that changed it) to the function that converts an older node."""
