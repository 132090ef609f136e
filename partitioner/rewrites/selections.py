"""Rewrite operators that select or move elements, mostly with Gather, GatherND and Slice.

The rewritten operators give exactly the same values.  The gradient of each output element is added
to the gradient of the input element from which it was copied.  The formulas are the definitions at
onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims, require_rank, take_input

Values = Sequence[ir.Value | None]


def _read_ints(node: ir.Node, index: int) -> list[int] | None:
    """Read a constant integer input.

    Return ``None`` if the input is not a constant, and an empty list if it is missing.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return []
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(entry) for entry in tensor.numpy().reshape(-1)]


def _flatten(builder: NodeBuilder, value: ir.Value) -> ir.Value:
    return builder.op("Reshape", value, builder.integers([-1]))


def _count(builder: NodeBuilder, value: ir.Value, axis: int | None = None) -> ir.Value:
    """Number the elements of a value, or the positions along an axis: 0, 1, 2, ... as int64."""
    if axis is None:
        total = builder.op("Size", value)
    else:
        total = builder.op("Squeeze", builder.shape(value, axis, axis + 1))
    return builder.op("Range", builder.integer(0), total, builder.integer(1))


def rewrite_compress(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Compress as a Gather at the positions where the condition is true.

    onnxruntime-training has no gradient for Compress.
    """
    x, condition = take_input(node, 0), take_input(node, 1)
    places = _flatten(builder, builder.op("NonZero", condition))
    axis = node.attributes.get_int("axis", None)
    if axis is None:
        return [builder.op("Gather", _flatten(builder, x), places, axis=0)]
    return [builder.op("Gather", x, places, axis=axis)]


def rewrite_unique(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Unique as a Gather of the first occurrence of each value.

    The gradient of a value goes to its first occurrence, even if the value occurs several times.
    The positions of the values are treated as constants.  onnxruntime-training has no gradient for
    Unique.
    """
    x = take_input(node, 0)
    made = builder.ops("Unique", [builder.detach(x)], 4, dict(node.attributes))
    axis = node.attributes.get_int("axis", None)
    if axis is None:
        y = builder.op("Gather", _flatten(builder, x), made[1], axis=0)
    else:
        y = builder.op("Gather", x, made[1], axis=axis)
    return [y, *made[1:]]


def rewrite_reverse_sequence(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite ReverseSequence with GatherND.

    Within a sequence of length n, step t becomes a copy of step n - 1 - t; steps after the end of
    the sequence stay in place.  onnxruntime-training has no gradient for ReverseSequence.
    """
    x, lengths = take_input(node, 0), take_input(node, 1)
    time = node.attributes.get_int("time_axis", 0)
    batch = node.attributes.get_int("batch_axis", 1)
    t = builder.op("Unsqueeze", _count(builder, x, time), builder.integers([batch]))
    b = builder.op("Unsqueeze", _count(builder, x, batch), builder.integers([time]))
    lengths = builder.cast(lengths, ir.DataType.INT64)
    length = builder.op("Unsqueeze", lengths, builder.integers([time]))
    turned = builder.op("Sub", builder.op("Sub", length, builder.integer(1)), t)
    source = builder.op("Where", builder.op("Less", t, length), turned, t)
    b = builder.op("Expand", b, builder.op("Shape", source))
    pair = [source, b] if time == 0 else [b, source]
    last = builder.integers([-1])
    places = builder.op("Concat", *(builder.op("Unsqueeze", p, last) for p in pair), axis=-1)
    return [builder.op("GatherND", x, places)]


def rewrite_slice(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite Slice with Gather if a step is negative or computed in the graph.

    onnxruntime-training's SliceGrad does not support negative steps.  A node is left unchanged if
    all its steps are positive constants.
    """
    x, starts, ends = take_input(node, 0), take_input(node, 1), take_input(node, 2)
    steps = _read_ints(node, 4)
    if steps is not None and all(step > 0 for step in steps):
        return None
    axes = _read_ints(node, 3)
    if axes is None or steps is None:
        chosen = builder.op("Reshape", _count(builder, x), builder.op("Shape", x))
        chosen = builder.op("Slice", chosen, *node.inputs[1:])
        return [builder.op("Gather", _flatten(builder, x), chosen, axis=0)]
    rank = require_rank(node, x)
    y = x
    for index, (axis, step) in enumerate(zip(axes or range(len(steps)), steps, strict=True)):
        place = builder.integers([index])
        start, end = (builder.op("Gather", limits, place, axis=0) for limits in (starts, ends))
        if step > 0:
            y = builder.op(
                "Slice", y, start, end, builder.integers([axis]), builder.integers([step])
            )
            continue
        chosen = builder.op(
            "Slice", _count(builder, x, axis % rank), start, end, builder.integers([0]),
            builder.integers([step]),
        )  # fmt: skip
        y = builder.op("Gather", y, chosen, axis=axis)
    return [y]


def rewrite_range(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Range as start + delta * (0, 1, 2, ...), with gradients for ``start`` and ``delta``.

    The length of the range is treated as a constant.  onnxruntime-training has no gradient for
    Range.
    """
    start, delta = take_input(node, 0), take_input(node, 2)
    detached = [builder.detach(value) for value in node.inputs if value is not None]
    places = builder.cast(_count(builder, builder.op("Range", *detached)), start.dtype)
    return [builder.op("Add", start, builder.op("Mul", delta, places))]


def rewrite_one_hot(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite OneHot as a Where that selects the value ``on`` or ``off``.

    With this rewrite, both values get a gradient.  onnxruntime-training has no gradient for OneHot.
    """
    indices, depth, values = take_input(node, 0), take_input(node, 1), take_input(node, 2)
    axis = node.attributes.get_int("axis", -1)
    truth = builder.tensor(ir.tensor(np.array([0, 1], np.int64)))
    hot = builder.op("OneHot", builder.detach(indices), builder.detach(depth), truth, axis=axis)
    off, on = (builder.op("Gather", values, builder.integer(place), axis=0) for place in (0, 1))
    return [builder.op("Where", builder.op("Cast", hot, to=ir.DataType.BOOL.value), on, off)]


def rewrite_transpose(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Set the attribute ``perm`` of a Transpose that lacks it to all axes in reverse order.

    This is the default of the attribute, but onnxruntime-training's gradient of Transpose requires
    it to be set.  Other nodes are left unchanged.
    """
    if "perm" in node.attributes:
        return None
    x = take_input(node, 0)
    order = [*reversed(range(require_rank(node, x)))]
    return [builder.op("Transpose", x, perm=order)]


def rewrite_concat(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite a Concat with repeated inputs so that all its inputs are distinct.

    Without this rewrite, onnxruntime-training would create two gradients with the same name for a
    repeated input.  Each repetition is replaced with an Identity of the input.  Other nodes are
    left unchanged.
    """
    values = [value for value in node.inputs if value is not None]
    if len(set(values)) == len(values):
        return None
    seen: set[ir.Value] = set()
    inputs = []
    for value in values:
        inputs.append(builder.op("Identity", value) if value in seen else value)
        seen.add(value)
    return [builder.op("Concat", *inputs, axis=node.attributes.get_int("axis"))]


def rewrite_reshape(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Detach the input of a Reshape with ``allowzero`` if it is known to have no elements.

    onnxruntime-training builds the gradient of Reshape as another Reshape, but without this
    attribute.  The attribute matters only to tensors without elements, and these get no gradient.
    If the target is a constant without a zero, the attribute has no effect, and it is removed.
    """
    if not node.attributes.get_int("allowzero", 0):
        return None
    x, shape = take_input(node, 0), take_input(node, 1)
    target = _read_ints(node, 1)
    dims = known_dims(x)
    if (target is not None and 0 in target) or (dims is not None and 0 in dims):
        return [builder.op("Reshape", builder.detach(x), shape, allowzero=1)]
    return None if target is None else [builder.op("Reshape", x, shape)]


def separate_splits(graph: ir.Graph, needed: set[ir.Value]) -> bool:
    """Replace the needed outputs of each Split with Slice nodes if not all outputs are needed.

    ``needed`` contains the values that get a gradient.  The graph is changed in place.  Return
    whether any Split was changed.

    In onnxruntime-training 1.19.2, the gradient of Split is the Concat of the gradients of its
    outputs, and the result has a wrong shape if one of these gradients is missing.  Call this
    function after ``get_optimized_model``, which merges adjacent Slices into one Split.
    """
    changed = False
    for node in [node for node in graph if node.op_type == "Split" and not node.domain]:
        wanted = [value for value in node.outputs if value in needed]
        if wanted and len(wanted) < len(node.outputs):
            _slice_apart(node, wanted)
            changed = True
    return changed


def _slice_apart(node: ir.Node, wanted: Sequence[ir.Value]) -> None:
    x = take_input(node, 0)
    axis = node.attributes.get_int("axis", 0) % require_rank(node, x)
    builder = NodeBuilder(f"{node.name or wanted[0].name}/separated")
    pieces = builder.ops("Split", node.inputs, len(node.outputs), dict(node.attributes))
    where = builder.integers([axis])
    start, made = builder.integers([0]), []
    for value, piece in zip(node.outputs, pieces, strict=True):
        end = builder.op("Add", start, builder.op("Shape", piece, start=axis, end=axis + 1))
        made.append(builder.op("Slice", x, start, end, where) if value in wanted else piece)
        start = end
    builder.replace(node, made)
