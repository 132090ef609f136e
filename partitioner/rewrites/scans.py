"""Write a Scan over any axes, in mixed directions, as one over first axes in one direction."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.bodies import build_scan, reverse_rows
from splitonnx.partitioner.graphs.builders import NodeBuilder, require_rank


def rewrite_scan(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value] | None:
    """Rewrite a Scan whose axes are not all the first, or whose directions are not all the same.

    Transposes bring the axes to the front and back.  Sequences that the Scan reads or writes from
    the end are reversed.  A Scan that needs none of this is left unchanged.
    """
    count = node.attributes.get_int("num_scan_inputs")
    split = len(node.inputs) - count
    results = len(node.outputs) - split
    axes = _list_integers(node, "scan_input_axes", count)
    turned = _list_integers(node, "scan_input_directions", count)
    out_axes = _list_integers(node, "scan_output_axes", results)
    out_turned = _list_integers(node, "scan_output_directions", results)
    if not any((*axes, *out_axes)) and len({*turned, *out_turned}) <= 1:
        return None
    given = [value for value in node.inputs if value is not None]
    rows = []
    for value, axis, turn in zip(given[split:], axes, turned, strict=True):
        rank = require_rank(node, value)
        row = _move(builder, value, [axis % rank, *(i for i in range(rank) if i != axis % rank)])
        rows.append(reverse_rows(builder, row) if turn else row)
    body = node.attributes["body"].as_graph().clone(allow_outer_scope_values=True)
    made = build_scan(builder, body, given[:split], rows)
    stacked = []
    pairs = zip(node.outputs[split:], made[split:], out_axes, out_turned, strict=True)
    for old, value, axis, turn in pairs:
        result = reverse_rows(builder, value) if turn else value
        if axis:
            rank = require_rank(node, old)
            order = list(range(1, rank))
            order.insert(axis % rank, 0)
            result = _move(builder, result, order)
        stacked.append(result)
    return [*made[:split], *stacked]


def _list_integers(node: ir.Node, name: str, count: int) -> Sequence[int]:
    attribute = node.attributes.get(name)
    return attribute.as_ints() if attribute is not None else [0] * count


def _move(builder: NodeBuilder, value: ir.Value, order: Sequence[int]) -> ir.Value:
    if list(order) == sorted(order):
        return value
    return builder.op("Transpose", value, perm=order)
