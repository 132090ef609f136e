"""Rewrite ScatterElements and ScatterND nodes that have a reduction.

onnxruntime-training builds wrong gradients for these nodes, because it ignores the reduction.
The rewrites give each reduction its own gradient.  For max and min, all elements that equal the
result share the gradient evenly, as in Max and Min.  For mul, the derivative with respect to each
factor is the product of the other factors, even if one of them is zero.  Indices may occur several
times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder

Values = Sequence[ir.Value | None]


@dataclass(frozen=True, kw_only=True)
class _Places:
    """The positions to which a scatter writes its updates."""

    builder: NodeBuilder
    indices: ir.Value
    axis: int | None

    def gather(self, source: ir.Value) -> ir.Value:
        """Return the elements at the updates' positions, in the shape of the updates."""
        if self.axis is None:
            return self.builder.op("GatherND", source, self.indices)
        return self.builder.op("GatherElements", source, self.indices, axis=self.axis)

    def scatter(self, base: ir.Value, updates: ir.Value, reduction: str) -> ir.Value:
        """Combine the updates with the elements at their positions in ``base``."""
        if self.axis is None:
            return self.builder.op("ScatterND", base, self.indices, updates, reduction=reduction)
        return self.builder.op(
            "ScatterElements", base, self.indices, updates, axis=self.axis, reduction=reduction
        )

    def add(self, like: ir.Value, updates: ir.Value) -> ir.Value:
        """Return a tensor in the shape of ``like`` with the sum of the updates at each position."""
        return self.scatter(self.fill(like, 0.0), updates, "add")

    def fill(self, like: ir.Value, number: float) -> ir.Value:
        """Return a tensor in the shape of ``like`` that is filled with ``number``."""
        assert like.dtype is not None
        value = ir.tensor([number], dtype=like.dtype)
        return self.builder.op(
            "ConstantOfShape", self.builder.shape(like), value=ir.AttrTensor("value", value)
        )


def rewrite_scatter(builder: NodeBuilder, node: ir.Node) -> Values | None:
    """Rewrite ScatterElements and ScatterND as sums and products if they have a reduction.

    onnxruntime-training builds wrong gradients for reductions.  A node is left unchanged if its
    reduction is ``none``.  It is also left unchanged if it adds updates to constant data: only the
    updates need a gradient then, and onnxruntime-training builds this gradient correctly.
    """
    reduction = node.attributes.get_string("reduction", "none")
    data, indices, updates = node.inputs[:3]
    assert data is not None
    assert indices is not None
    assert updates is not None
    if reduction == "none" or (reduction == "add" and _is_constant(data)):
        return None
    axis = node.attributes.get_int("axis", 0) if node.op_type == "ScatterElements" else None
    places = _Places(builder=builder, indices=indices, axis=axis)
    if reduction == "add":
        return [builder.op("Add", data, places.add(data, updates))]
    if reduction == "mul":
        return [builder.op("Mul", data, _multiply(places, data, updates))]
    return [_select(places, data, updates, reduction)]


def _is_constant(data: ir.Value) -> bool:
    """Return whether the data are constant; then the gradient of a sum is right."""
    maker = data.producer()
    return maker is not None and maker.op_type in ("Constant", "ConstantOfShape")


def _multiply(places: _Places, data: ir.Value, updates: ir.Value) -> ir.Value:
    """Return the product of the updates at each position.

    The derivative for each update is the product of the other updates.
    """
    builder = places.builder
    fixed = builder.detach(updates)
    zero, one = builder.number(0.0, updates.dtype), builder.number(1.0, updates.dtype)
    ones = places.fill(data, 1.0)
    is_zero = builder.op("Equal", fixed, zero)
    others = builder.op("Where", is_zero, one, fixed)
    product = places.gather(places.scatter(ones, others, "mul"))
    count = places.gather(places.add(data, builder.op("Where", is_zero, one, zero)))
    mine = builder.op("Where", is_zero, one, zero)
    rest = builder.op("Equal", count, mine)  # no other factor is zero
    slope = builder.op("Where", rest, builder.op("Div", product, others), zero)
    moved = builder.op("Mul", builder.detach(slope), builder.op("Sub", updates, fixed))
    return builder.op(
        "Add", builder.detach(places.scatter(ones, fixed, "mul")), places.add(data, moved)
    )


def _select(places: _Places, data: ir.Value, updates: ir.Value, reduction: str) -> ir.Value:
    """Return the mean of the elements that win at each position; they share the gradient."""
    builder = places.builder
    fixed_data, fixed = builder.detach(data), builder.detach(updates)
    best = places.scatter(fixed_data, fixed, reduction)
    wins_data = builder.op("Equal", fixed_data, best)
    wins = builder.op("Equal", fixed, places.gather(best))
    zero, one = builder.number(0.0, data.dtype), builder.number(1.0, data.dtype)
    number = builder.op(
        "Add",
        builder.op("Where", wins_data, one, zero),
        places.add(data, builder.op("Where", wins, one, zero)),
    )
    kept = builder.op("Where", wins_data, data, zero)
    summed = builder.op("Add", kept, places.add(data, builder.op("Where", wins, updates, zero)))
    return builder.op("Div", summed, builder.detach(number))
