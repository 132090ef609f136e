"""Read weights stored as integers before they are moved, so that their floats can be trained.

``quantize_static`` applies operators such as Gather to a table of integers, and dequantizes what
they give.  No gradient passes to the table there.  Dequantizing the whole table first gives the
same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import (
    NodeBuilder,
    known_array,
    known_dims,
    known_rank,
    take_input,
)
from splitonnx.partitioner.normalization.dequantized.weights import (
    MOVING,
    FloatWeights,
    Settings,
    is_channelwise,
)

SPREADING = frozenset({"Concat", "Expand", "Tile"})
"""Operators that repeat elements or join tensors, which floats may pass as well."""


def list_stored(value: ir.Value) -> list[ir.Value]:
    """Return the constants whose elements a value holds, itself if it is one."""
    if known_array(value) is not None:
        return [value]
    return [found for part in _list_parts(value) for found in list_stored(part)]


def can_move(value: ir.Value, settings: Settings) -> bool:
    """Return whether a value holds moved constants that can be dequantized before they move."""
    is_moved = known_array(value) is None and bool(list_stored(value))
    return is_moved and _trace_axis(value, settings) is not None


def pair_moved(
    builder: NodeBuilder, node: ir.Node, weights: FloatWeights, value: ir.Value, settings: Settings
) -> ir.Value:
    """Return the floats of integers, dequantized before they are moved if they are constants.

    If the scale has several elements, its axis must be known before each operator.
    """
    maker = value.producer()
    if maker is None or not can_move(value, settings):
        return weights.pair(builder, node, value, settings)
    axes = settings.axes if is_channelwise(settings) else ()
    key = ("moved", value, settings.scale, settings.zero, axes, node.graph)
    if key not in weights.moved:
        axis = _trace_axis(value, settings)
        assert axis is not None
        inner, parts = replace(settings, axes=(axis,)), _list_parts(value)
        read = [pair_moved(builder, node, weights, part, inner) for part in parts]
        inputs = [*read, *maker.inputs[len(parts) :]]
        made = builder.ops(maker.op_type, inputs, 1, _list_attributes(maker))[0]
        made.name = weights.choose_name(value.name or "activation")
        weights.moved[key] = made
    return weights.moved[key]


def _list_attributes(maker: ir.Node) -> dict[str, ir.Attr]:
    """Return a node's attributes, with the order of a Transpose written out.

    ONNX Runtime 1.19.2 breaks down over one without, after a DequantizeLinear with several scales.
    """
    kept, rank = dict(maker.attributes), known_rank(take_input(maker))
    if maker.op_type == "Transpose" and rank is not None:
        kept.setdefault("perm", ir.AttrInt64s("perm", range(rank)[::-1]))
    return kept


def _list_parts(value: ir.Value) -> list[ir.Value]:
    """Return the tensors whose elements an operator moves, or nothing if it computes."""
    maker = value.producer()
    if maker is None or maker.domain or maker.op_type not in MOVING | SPREADING:
        return []
    if maker.op_type == "Concat":
        return [part for part in maker.inputs if part is not None]
    return [take_input(maker)]


def _trace_axis(value: ir.Value, settings: Settings) -> int | None:
    """Return the axis of a scale before the operator that makes ``value``, or ``None``."""
    if not is_channelwise(settings):
        return settings.axes[0]
    maker, rank, scale = value.producer(), known_rank(value), known_array(settings.scale)
    before = None if maker is None else known_dims(take_input(maker))
    if maker is None or rank is None or before is None or scale is None:
        return None
    axis = _trace(maker, settings.axes[0] % rank, rank, len(before))
    fits = axis is not None and before[axis] == scale.size
    return axis if fits else None


def _trace(maker: ir.Node, axis: int, rank: int, before: int) -> int | None:
    kind = maker.op_type
    if kind in ("Identity", "Slice"):
        return axis
    if kind == "Concat":
        return axis if axis != maker.attributes["axis"].as_int() % rank else None
    if kind == "Transpose":
        order = maker.attributes.get_ints("perm", range(rank)[::-1])
        return int(order[axis])
    if kind == "Gather":
        gathered = maker.attributes.get_int("axis", 0) % before
        ids = rank - before + 1
        if axis < gathered:
            return axis
        return axis - ids + 1 if axis >= gathered + ids else None
    if kind not in ("Squeeze", "Unsqueeze") or (axes := _read_axes(maker)) is None:
        return None
    if kind == "Squeeze":
        kept = [a for a in range(before) if a not in {b % before for b in axes}]
        return kept[axis]
    kept = [a for a in range(rank) if a not in {b % rank for b in axes}]
    return kept.index(axis) if axis in kept else None


def _read_axes(maker: ir.Node) -> Sequence[int] | None:
    """Return the axes of a Squeeze or Unsqueeze, which are an input since opset 13."""
    known = known_array(maker.inputs[1]) if len(maker.inputs) > 1 else None
    if known is not None:
        return [int(axis) for axis in np.atleast_1d(known)]
    return maker.attributes.get_ints("axes", None)
