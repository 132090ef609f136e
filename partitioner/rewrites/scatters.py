"""ScatterElements and ScatterND with a reduction, whose gradient onnxruntime-training gets wrong.

Its builder treats every reduction as "none".  Here what meets at a place is told apart: the
winners of max and min share the gradient evenly, as they do in Max and Min; the factors of mul
get the product of the others, also where one of them is zero.  Indices may occur several times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder

Values = Sequence[ir.Value | None]


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where the updates of a scatter go, and how to read from there."""

    draft: NodeBuilder
    indices: ir.Value
    axis: int | None

    def gather(self, source: ir.Value) -> ir.Value:
        """Return the elements at the updates' positions, in the shape of the updates."""
        if self.axis is None:
            return self.draft.op("GatherND", source, self.indices)
        return self.draft.op("GatherElements", source, self.indices, axis=self.axis)

    def scatter(self, base: ir.Value, updates: ir.Value, reduction: str) -> ir.Value:
        """Combine the updates with the elements at their positions in ``base``."""
        if self.axis is None:
            return self.draft.op("ScatterND", base, self.indices, updates, reduction=reduction)
        return self.draft.op(
            "ScatterElements", base, self.indices, updates, axis=self.axis, reduction=reduction
        )

    def add(self, like: ir.Value, updates: ir.Value) -> ir.Value:
        """Sum the updates that share a place, in the shape of ``like``."""
        return self.scatter(self.fill(like, 0.0), updates, "add")

    def fill(self, like: ir.Value, number: float) -> ir.Value:
        """Return a constant in the shape of ``like``."""
        assert like.dtype is not None
        value = ir.tensor([number], dtype=like.dtype)
        return self.draft.op(
            "ConstantOfShape", self.draft.shape(like), value=ir.AttrTensor("value", value)
        )


def rewrite_scatter(draft: NodeBuilder, node: ir.Node) -> Values | None:
    """Write what the node's reduction does to data and updates as sums and products of them."""
    reduction = node.attributes.get_string("reduction", "none")
    data, indices, updates = node.inputs[:3]
    assert data is not None
    assert indices is not None
    assert updates is not None
    if reduction == "none" or (reduction == "add" and _is_constant(data)):
        return None
    axis = node.attributes.get_int("axis", 0) if node.op_type == "ScatterElements" else None
    places = _Places(draft=draft, indices=indices, axis=axis)
    if reduction == "add":
        return [draft.op("Add", data, places.add(data, updates))]
    if reduction == "mul":
        return [draft.op("Mul", data, _multiply(places, data, updates))]
    return [_select(places, data, updates, reduction)]


def _is_constant(data: ir.Value) -> bool:
    """The gradient of a sum to the updates alone is right."""
    maker = data.producer()
    return maker is not None and maker.op_type in ("Constant", "ConstantOfShape")


def _multiply(places: _Places, data: ir.Value, updates: ir.Value) -> ir.Value:
    """The product of the updates at each place, with the product of the others as its slope."""
    draft = places.draft
    fixed = draft.detach(updates)
    zero, one = draft.number(0.0, updates.dtype), draft.number(1.0, updates.dtype)
    ones = places.fill(data, 1.0)
    is_zero = draft.op("Equal", fixed, zero)
    others = draft.op("Where", is_zero, one, fixed)
    product = places.gather(places.scatter(ones, others, "mul"))
    count = places.gather(places.add(data, draft.op("Where", is_zero, one, zero)))
    mine = draft.op("Where", is_zero, one, zero)
    rest = draft.op("Equal", count, mine)  # no other factor is zero
    slope = draft.op("Where", rest, draft.op("Div", product, others), zero)
    moved = draft.op("Mul", draft.detach(slope), draft.op("Sub", updates, fixed))
    return draft.op(
        "Add", draft.detach(places.scatter(ones, fixed, "mul")), places.add(data, moved)
    )


def _select(places: _Places, data: ir.Value, updates: ir.Value, reduction: str) -> ir.Value:
    """The winners at each place, each taken as many times as one in their number."""
    draft = places.draft
    fixed_data, fixed = draft.detach(data), draft.detach(updates)
    best = places.scatter(fixed_data, fixed, reduction)
    wins_data = draft.op("Equal", fixed_data, best)
    wins = draft.op("Equal", fixed, places.gather(best))
    zero, one = draft.number(0.0, data.dtype), draft.number(1.0, data.dtype)
    number = draft.op(
        "Add",
        draft.op("Where", wins_data, one, zero),
        places.add(data, draft.op("Where", wins, one, zero)),
    )
    kept = draft.op("Where", wins_data, data, zero)
    summed = draft.op("Add", kept, places.add(data, draft.op("Where", wins, updates, zero)))
    return draft.op("Div", summed, draft.detach(number))
