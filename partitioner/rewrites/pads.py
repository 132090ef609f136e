"""Rewrite Pad and CenterCropPad so that they can be differentiated.

onnxruntime-training can differentiate a Pad in constant mode, even with negative widths, but its
gradient ignores the optional list of axes.  In the other modes, each output element is a copy of
one input element, which depends only on the output element's position.  As in ONNX Runtime,
negative widths crop the axes first, and positive widths pad them afterwards.  The formulas are
those of Pad-21 and CenterCropPad-18 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array
from splitonnx.partitioner.graphs.tables import limit
from splitonnx.partitioner.rewrites.shape_rules import (
    Extent,
    add,
    count_up,
    join,
    read_extents,
    require_array,
    require_rank,
)

Values = Sequence[ir.Value]


def rewrite_pad(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite Pad if onnxruntime-training's gradient of Pad is missing or wrong.

    In the modes ``reflect``, ``edge`` and ``wrap``, Pad becomes one Gather per padded axis.  In
    constant mode, a Pad that lists its axes becomes a Pad over all axes, and a padding value that
    is computed in the graph is inserted with Where, so that it gets a gradient.  Any other Pad in
    constant mode is left unchanged.
    """
    x, *settings = node.inputs
    assert x is not None
    mode = node.attributes.get_string("mode", "constant")
    chosen = settings[2] if len(settings) > 2 else None
    if mode == "constant":
        computed = (
            len(settings) > 1 and settings[1] is not None and known_array(settings[1]) is None
        )
        return _pad_constantly(builder, node, x) if computed or chosen is not None else None
    rank = require_rank(node, x)
    axes = list(range(rank))
    if chosen is not None:
        axes = [axis % rank for axis in require_array(node, 3, "axes").tolist()]
    widths = require_array(node, 1, "widths").tolist()
    extents, made = read_extents(builder, node, x), x
    before, after = widths[: len(axes)], widths[len(axes) :]
    for axis, begin, end in zip(axes, before, after, strict=True):
        if begin or end:
            size = extents[axis]
            limit(node, abs(begin) + abs(end) + (size if isinstance(size, int) else 0))
            places = _find_places(builder, extents[axis], begin, end, mode)
            made = builder.op("Gather", made, places, axis=axis)
    return [made]


def _find_places(builder: NodeBuilder, size: Extent, begin: int, end: int, mode: str) -> ir.Value:
    """Return the index of the element that each position of a padded axis copies, as int64."""
    cut, kept = max(0, -begin), add(builder, size, min(0, begin) + min(0, end))
    begin, end = max(0, begin), max(0, end)
    if isinstance(kept, int):
        index = np.arange(kept)
        padded = np.pad(index, (begin, end), mode=mode)  # type: ignore[call-overload]
        return builder.integers((padded + cut).tolist())
    places = count_up(builder, add(builder, kept, begin + end))
    places = builder.op("Sub", places, builder.integers([begin]))
    last = add(builder, kept, -1)
    assert isinstance(last, ir.Value)
    zero, one = builder.integers([0]), builder.integers([1])
    if mode == "edge":
        places = builder.op("Min", builder.op("Max", places, zero), last)
    elif mode == "wrap":
        places = builder.op("Mod", places, kept)
    else:  # reflect: forwards, then backwards
        period = builder.op("Max", builder.op("Add", last, last), one)
        places = builder.op("Mod", places, period)
        places = builder.op("Min", places, builder.op("Sub", period, places))
    return places if cut == 0 else builder.op("Add", places, builder.integers([cut]))


def _pad_constantly(builder: NodeBuilder, node: ir.Node, x: ir.Value) -> Values:
    """Pad along all axes; insert a computed padding value with Where, so that it gets a gradient.

    Multiplication would not work, because the value may be infinite, for example in attention
    masks.
    """
    _, widths, value, axes = [*node.inputs, None, None][:4]
    assert widths is not None
    if axes is not None:
        widths = _widen(builder, node, x, widths)
    if value is None or known_array(value) is not None:
        return [builder.op("Pad", x, widths, value, mode="constant")]
    zeros = builder.op("Expand", builder.number(0.0, x.dtype), builder.shape(x))
    padding = builder.op("Pad", zeros, widths, builder.number(1.0, x.dtype), mode="constant")
    plain = builder.op("Pad", x, widths, mode="constant")
    return [
        builder.op("Where", builder.op("Cast", padding, to=ir.DataType.BOOL.value), value, plain)
    ]


def _widen(builder: NodeBuilder, node: ir.Node, x: ir.Value, widths: ir.Value) -> ir.Value:
    """Return the widths along all axes."""
    rank = require_rank(node, x)
    begins = [axis % rank for axis in require_array(node, 3, "axes").tolist()]
    places = [*begins, *(rank + axis for axis in begins)]
    known = known_array(widths)
    if known is not None:
        full = np.zeros(2 * rank, np.int64)
        full[places] = known
        return builder.integers(full.tolist())
    zeros = builder.integers([0] * (2 * rank))
    return builder.op("ScatterElements", zeros, builder.integers(places), widths, axis=0)


def rewrite_center_crop_pad(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite CenterCropPad as a Pad, with negative widths where elements are removed.

    If the number of elements to add or remove is odd, the extra element is at the end of the axis.
    onnxruntime-training has no gradient for CenterCropPad.
    """
    x, wanted = node.inputs[:2]
    assert x is not None
    assert wanted is not None
    rank = require_rank(node, x)
    axes = [axis % rank for axis in node.attributes.get_ints("axes", range(rank))]
    extents, sizes = read_extents(builder, node, x), known_array(wanted)
    chosen = [extents[axis] for axis in axes]
    numbers = [extent for extent in chosen if isinstance(extent, int)]
    if sizes is not None and len(numbers) == len(axes):
        missing = [int(m) - n for m, n in zip(sizes, numbers, strict=True)]
        begin = [int(d / 2) for d in missing]
        full = [0] * (2 * rank)
        for axis, d, b in zip(axes, missing, begin, strict=True):
            full[axis], full[rank + axis] = b, d - b
        return [builder.op("Pad", x, builder.integers(full), mode="constant")]
    more = builder.op("Sub", wanted, join(builder, chosen))
    half = builder.op("Div", more, builder.integers([2]))  # towards zero
    rest = builder.op("Sub", more, half)
    padding = builder.op("Concat", half, rest, axis=0)
    places = builder.integers([*axes, *(rank + axis for axis in axes)])
    widths = builder.op(
        "ScatterElements", builder.integers([0] * (2 * rank)), places, padding, axis=0
    )
    return [builder.op("Pad", x, widths, mode="constant")]
