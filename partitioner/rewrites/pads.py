"""Pad in the modes that repeat elements, and CenterCropPad.

A gradient passes through Pad's constant mode, negative widths included, where it names no axes:
onnxruntime-training's gradient forgets them.  The other modes copy elements, and where each comes
from is a function of its place.  Formulas: Pad-21 and
CenterCropPad-18 at onnx.ai/onnx/operators; negative widths are cut off before the rest is padded,
as ONNX Runtime does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array
from splitonnx.partitioner.graphs.tables import limit
from splitonnx.partitioner.rewrites.extents import (
    Extent,
    add,
    count_up,
    join,
    read_extents,
    require_array,
    require_rank,
)

Values = Sequence[ir.Value]


def rewrite_pad(draft: NodeBuilder, node: ir.Node) -> Values | None:
    """Gather along each axis that is padded; constant mode only names its axes no more."""
    x, *settings = node.inputs
    assert x is not None
    mode = node.attributes.get_string("mode", "constant")
    chosen = settings[2] if len(settings) > 2 else None
    if mode == "constant":
        computed = (
            len(settings) > 1 and settings[1] is not None and known_array(settings[1]) is None
        )
        return _pad_constantly(draft, node, x) if computed or chosen is not None else None
    rank = require_rank(node, x)
    axes = list(range(rank))
    if chosen is not None:
        axes = [axis % rank for axis in require_array(node, 3, "axes").tolist()]
    widths = require_array(node, 1, "widths").tolist()
    extents, made = read_extents(draft, node, x), x
    before, after = widths[: len(axes)], widths[len(axes) :]
    for axis, begin, end in zip(axes, before, after, strict=True):
        if begin or end:
            size = extents[axis]
            limit(node, abs(begin) + abs(end) + (size if isinstance(size, int) else 0))
            places = _find_places(draft, extents[axis], begin, end, mode)
            made = draft.op("Gather", made, places, axis=axis)
    return [made]


def _find_places(draft: NodeBuilder, size: Extent, begin: int, end: int, mode: str) -> ir.Value:
    """Return the element that each place of a padded axis copies, as I64 vector."""
    cut, kept = max(0, -begin), add(draft, size, min(0, begin) + min(0, end))
    begin, end = max(0, begin), max(0, end)
    if isinstance(kept, int):
        index = np.arange(kept)
        padded = np.pad(index, (begin, end), mode=mode)  # type: ignore[call-overload]
        return draft.integers((padded + cut).tolist())
    places = count_up(draft, add(draft, kept, begin + end))
    places = draft.op("Sub", places, draft.integers([begin]))
    last = add(draft, kept, -1)
    assert isinstance(last, ir.Value)
    zero, one = draft.integers([0]), draft.integers([1])
    if mode == "edge":
        places = draft.op("Min", draft.op("Max", places, zero), last)
    elif mode == "wrap":
        places = draft.op("Mod", places, kept)
    else:  # there and back again
        period = draft.op("Max", draft.op("Add", last, last), one)
        places = draft.op("Mod", places, period)
        places = draft.op("Min", places, draft.op("Sub", period, places))
    return places if cut == 0 else draft.op("Add", places, draft.integers([cut]))


def _pad_constantly(draft: NodeBuilder, node: ir.Node, x: ir.Value) -> Values:
    """Pad along all axes; a value that is computed is chosen, for Pad has no gradient to it.

    It may be infinite, as masks of attention are, so nothing is multiplied by it.
    """
    _, widths, value, axes = [*node.inputs, None, None][:4]
    assert widths is not None
    if axes is not None:
        widths = _widen(draft, node, x, widths)
    if value is None or known_array(value) is not None:
        return [draft.op("Pad", x, widths, value, mode="constant")]
    zeros = draft.op("Expand", draft.number(0.0, x.dtype), draft.shape(x))
    padding = draft.op("Pad", zeros, widths, draft.number(1.0, x.dtype), mode="constant")
    plain = draft.op("Pad", x, widths, mode="constant")
    return [draft.op("Where", draft.op("Cast", padding, to=ir.DataType.BOOL.value), value, plain)]


def _widen(draft: NodeBuilder, node: ir.Node, x: ir.Value, widths: ir.Value) -> ir.Value:
    """Return the widths along all axes."""
    rank = require_rank(node, x)
    begins = [axis % rank for axis in require_array(node, 3, "axes").tolist()]
    places = [*begins, *(rank + axis for axis in begins)]
    known = known_array(widths)
    if known is not None:
        full = np.zeros(2 * rank, np.int64)
        full[places] = known
        return draft.integers(full.tolist())
    zeros = draft.integers([0] * (2 * rank))
    return draft.op("ScatterElements", zeros, draft.integers(places), widths, axis=0)


def rewrite_center_crop_pad(draft: NodeBuilder, node: ir.Node) -> Values:
    """A Pad whose widths are negative where it crops; what is odd goes to the end."""
    x, wanted = node.inputs[:2]
    assert x is not None
    assert wanted is not None
    rank = require_rank(node, x)
    axes = [axis % rank for axis in node.attributes.get_ints("axes", range(rank))]
    extents, sizes = read_extents(draft, node, x), known_array(wanted)
    chosen = [extents[axis] for axis in axes]
    numbers = [extent for extent in chosen if isinstance(extent, int)]
    if sizes is not None and len(numbers) == len(axes):
        missing = [int(m) - n for m, n in zip(sizes, numbers, strict=True)]
        begin = [int(d / 2) for d in missing]
        full = [0] * (2 * rank)
        for axis, d, b in zip(axes, missing, begin, strict=True):
            full[axis], full[rank + axis] = b, d - b
        return [draft.op("Pad", x, draft.integers(full), mode="constant")]
    more = draft.op("Sub", wanted, join(draft, chosen))
    half = draft.op("Div", more, draft.integers([2]))  # towards zero
    rest = draft.op("Sub", more, half)
    padding = draft.op("Concat", half, rest, axis=0)
    places = draft.integers([*axes, *(rank + axis for axis in axes)])
    widths = draft.op("ScatterElements", draft.integers([0] * (2 * rank)), places, padding, axis=0)
    return [draft.op("Pad", x, widths, mode="constant")]
