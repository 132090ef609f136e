"""Rewrite Einsum as a sequence of diagonals, sums, products and transpositions.

The operands are contracted from left to right.  Each axis is identified by its label.  An operand
that may have size 1 along an axis is first repeated where a sum or a Reshape needs the complete
axis.  The formulas are those of Einsum-12 at onnx.ai/onnx/operators, and of numpy.einsum.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims
from splitonnx.partitioner.inference.shape_rules import Labels, read_equation

Values = Sequence[ir.Value | None]
Size = int | ir.Value
"""The length of an axis: a number, or an int64 vector of one element that the graph computes."""


@dataclass(frozen=True, kw_only=True)
class _Operand:
    """A value with one label per axis."""

    value: ir.Value
    labels: Labels


@dataclass(frozen=True, kw_only=True)
class _Sum:
    """An equation that is being rewritten, with the builder of its nodes and the axes' lengths."""

    builder: NodeBuilder
    sizes: Mapping[str, Size]
    unsure: Collection[str]
    """Labels along which one operand may have size 1, and another the size in ``sizes``."""

    def contract(self, left: _Operand, right: _Operand, kept: Collection[str]) -> _Operand:
        """Multiply two operands, and sum over labels that both have and that ``kept`` lacks."""
        shared = [label for label in left.labels if label in right.labels]
        batch = tuple(label for label in shared if label in kept)
        summed = tuple(label for label in shared if label not in kept)
        rows = tuple(label for label in left.labels if label not in shared)
        columns = tuple(label for label in right.labels if label not in shared)
        if not summed:
            return self._multiply(left, right, batch, rows, columns)
        is_stacked = len(rows) == len(columns) == len(summed) == 1
        needed = summed if is_stacked else (*summed, *batch, *rows, *columns)
        left, right = self._repeat(left, needed), self._repeat(right, needed)
        a = self._group(left, batch, rows, summed)
        b = self._group(right, batch, summed, columns)
        product = self.builder.op("MatMul", a, b)
        labels = batch + rows + columns
        if len(rows) != 1 or len(columns) != 1:
            product = self._shape(product, labels)
        return _Operand(value=product, labels=labels)

    def _repeat(self, operand: _Operand, needed: Collection[str]) -> _Operand:
        """Repeat an operand along the axes in ``needed`` where its size may be 1."""
        unsure = [label for label in needed if label in self.unsure and label in operand.labels]
        if not unsure:
            return operand
        pieces = [self.sizes[label] if label in unsure else 1 for label in operand.labels]
        value = self.builder.op("Expand", operand.value, self._join(pieces))
        return _Operand(value=value, labels=operand.labels)

    def _multiply(
        self,
        left: _Operand,
        right: _Operand,
        batch: Labels,
        rows: Labels,
        columns: Labels,
    ) -> _Operand:
        """Multiply two operands elementwise, without summing; the axes are batch, rows, columns."""
        a = self.transpose(left, batch + rows)
        if columns and rows + batch:
            places = range(len(a.labels), len(a.labels) + len(columns))
            a = self._unsqueeze(a, places)
        b = self.transpose(right, batch + columns)
        if rows and columns + batch:
            b = self._unsqueeze(b, range(len(batch), len(batch) + len(rows)))
        product = self.builder.op("Mul", a.value, b.value)
        return _Operand(value=product, labels=batch + rows + columns)

    def _unsqueeze(self, operand: _Operand, places: Sequence[int]) -> _Operand:
        value = self.builder.op("Unsqueeze", operand.value, self.builder.integers(places))
        return _Operand(value=value, labels=operand.labels)

    def _group(self, operand: _Operand, batch: Labels, *groups: Labels) -> ir.Value:
        """Return an operand as a stack of matrices: batch axes, then one axis per group."""
        value = self.transpose(operand, batch + sum(groups, ())).value
        if all(len(group) == 1 for group in groups):
            return value
        return self._shape(value, batch, groups)

    def transpose(self, operand: _Operand, labels: Labels) -> _Operand:
        """Transpose an operand so that its axes have the order of ``labels``."""
        if operand.labels == labels:
            return operand
        perm = [operand.labels.index(label) for label in labels]
        return _Operand(value=self.builder.op("Transpose", operand.value, perm=perm), labels=labels)

    def total(self, operand: _Operand, gone: Collection[str]) -> _Operand:
        """Sum an operand over the labels in ``gone``."""
        axes = [axis for axis, label in enumerate(operand.labels) if label in gone]
        if not axes:
            return operand
        value = self.builder.op("ReduceSum", operand.value, self.builder.integers(axes), keepdims=0)
        labels = tuple(label for label in operand.labels if label not in gone)
        return _Operand(value=value, labels=labels)

    def diagonal(self, operand: _Operand) -> _Operand:
        """Reduce axes with the same label to their diagonal, until each label occurs only once."""
        labels = operand.labels
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is None:
            return operand
        operand = self._repeat(operand, [twice])
        first, second = [axis for axis, label in enumerate(labels) if label == twice][:2]
        rest = [axis for axis in range(len(labels)) if axis not in (first, second)]
        others = tuple(labels[axis] for axis in rest)
        value = self.builder.op("Transpose", operand.value, perm=[first, second, *rest])
        value = self._shape(value, (), [(twice, twice), *((label,) for label in others)])
        value = self.builder.op("Gather", value, self._place_diagonal(self.sizes[twice]), axis=0)
        return self.diagonal(_Operand(value=value, labels=(twice, *others)))

    def _place_diagonal(self, size: Size) -> ir.Value:
        """Return the positions of the diagonal's elements in a flattened square matrix."""
        if isinstance(size, int):
            return self.builder.integers([index * (size + 1) for index in range(size)])
        size = self.builder.op("Squeeze", size, self.builder.integers([0]))
        places = self.builder.op("Range", self.builder.integer(0), size, self.builder.integer(1))
        return self.builder.op("Mul", places, self.builder.op("Add", size, self.builder.integer(1)))

    def _shape(self, value: ir.Value, batch: Labels, groups: Sequence[Labels] = ()) -> ir.Value:
        """Reshape to one axis per label of ``batch`` and one per group; one may be unknown."""
        found = [self._measure(group) for group in [*((label,) for label in batch), *groups]]
        unknown = [index for index, size in enumerate(found) if not isinstance(size, int)]
        if len(unknown) == 1:
            found[unknown[0]] = -1
        return self.builder.op("Reshape", value, self._join(found))

    def _join(self, found: Sequence[Size]) -> ir.Value:
        """Return the vector of the lengths in ``found``."""
        if all(isinstance(size, int) for size in found):
            return self.builder.integers([size for size in found if isinstance(size, int)])
        pieces = [self.builder.integers([s]) if isinstance(s, int) else s for s in found]
        return self.builder.op("Concat", *pieces, axis=0)

    def _measure(self, group: Labels) -> Size:
        sizes = [self.sizes[label] for label in group]
        total: Size = math.prod(size for size in sizes if isinstance(size, int))
        for size in sizes:
            if isinstance(size, ir.Value):
                known = self.builder.integers([total]) if isinstance(total, int) else total
                total = size if total == 1 else self.builder.op("Mul", known, size)
        return total


def rewrite_einsum(builder: NodeBuilder, node: ir.Node) -> Values:
    """Rewrite Einsum with MatMul, Mul and ReduceSum, and transpose the result if necessary.

    The operands are contracted from left to right.  onnxruntime-training has no gradient for
    Einsum.
    """
    values = [value for value in node.inputs if value is not None]
    terms, result = _read_equation(node, values)
    operands = [_Operand(value=v, labels=t) for v, t in zip(values, terms, strict=True)]
    unsure = _find_unsure(operands)
    sizes, operands = _measure_labels(builder, operands, unsure)
    work = _Sum(builder=builder, sizes=sizes, unsure=unsure)
    operands = [work.diagonal(operand) for operand in operands]
    made: _Operand | None = None
    for index, operand in enumerate(operands):
        later = {label for other in operands[index + 1 :] for label in other.labels} | {*result}
        if made is None:
            made = work.total(operand, {*operand.labels} - later)
            continue
        own = {*operand.labels} - later - {*made.labels}
        operand = work.total(operand, own)
        made = work.contract(made, operand, later)
        made = work.total(made, {*made.labels} - later)
    assert made is not None
    return [work.transpose(made, result).value]


def _read_equation(node: ir.Node, values: Sequence[ir.Value]) -> tuple[list[Labels], Labels]:
    """Return the labels of the axes of each operand, and of the result."""
    equation = node.attributes.get_string("equation") or ""
    for value in values:
        if value.shape is None:
            raise _refuse(node, f"'{value.name}' has to have a known number of axes")
    read = read_equation(equation, [len(value.shape or ()) for value in values])
    if read is None:
        raise _refuse(node, f"'{equation}' does not fit its {len(values)} inputs")
    return read


def _refuse(node: ir.Node, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"node '{node.name}' (Einsum)", reason, "export the model with shapes that fit"
    )


def _find_unsure(operands: Sequence[_Operand]) -> set[str]:
    """Find the labels along which an operand may have size 1 while another has more."""
    found: dict[str, set[int | str]] = {}
    for operand in operands:
        for axis, (label, dim) in enumerate(
            zip(operand.labels, operand.value.shape or (), strict=True)
        ):
            own = dim if isinstance(dim, int) else dim.value or f"{operand.value.name}:{axis}"
            found.setdefault(label, set()).add(own)
    return {label for label, dims in found.items() if len(dims - {1}) > 1}


def _choose_size(builder: NodeBuilder, left: Size, right: Size) -> Size:
    """Return the length that two axes of these lengths are broadcast to."""
    if isinstance(left, int) and isinstance(right, int):
        return right if left == 1 else left
    if isinstance(left, int) or isinstance(right, int):
        number, other = (left, right) if isinstance(left, int) else (right, left)
        return other if number == 1 else number
    is_one = builder.op("Equal", left, builder.integers([1]))
    return builder.op("Where", is_one, right, left)


def _measure_labels(
    builder: NodeBuilder, operands: Sequence[_Operand], unsure: Collection[str]
) -> tuple[dict[str, Size], list[_Operand]]:
    """Find the length of each label's axes, and drop axes of length 1 that are broadcast."""
    sizes: dict[str, Size] = {}
    for operand in operands:
        dims = known_dims(operand.value) or []
        for axis, (label, dim) in enumerate(zip(operand.labels, dims, strict=True)):
            old = sizes.get(label, 1)
            if dim is not None:
                sizes[label] = _choose_size(builder, dim, old)
            elif old == 1 or (label in unsure and not isinstance(old, int)):
                own = builder.shape(operand.value, axis, axis + 1)
                sizes[label] = _choose_size(builder, old, own)
    spread = []
    for operand in operands:
        dims = known_dims(operand.value) or []
        pairs = list(enumerate(zip(operand.labels, dims, strict=True)))
        gone = [axis for axis, (label, dim) in pairs if dim == 1 and sizes[label] != 1]
        value = operand.value
        if gone:
            value = builder.op("Squeeze", value, builder.integers(gone))
        labels = tuple(label for axis, (label, _) in pairs if axis not in gone)
        spread.append(_Operand(value=value, labels=labels))
    return sizes, spread
