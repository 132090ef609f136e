"""Rules for inferring output shapes that depend on the contents of a node's inputs.

Each rule is a function for one operator.  It takes a node and the known shapes and contents of its
inputs, and returns the shapes of its outputs.  A dimension is a number, a :class:`dimensions.Dim`,
or ``None`` if it is not certain.  A rule returns ``None`` if it cannot infer anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.inference.dimensions import (
    Amount,
    Dim,
    Undecided,
    divide_exactly,
    is_equal,
    is_less,
    is_natural,
    is_unknown,
    multiply,
    name_unknown,
    parse_dim,
    prod_of,
    sum_of,
)

Dims = list[Amount]


class Known(Protocol):
    """An object that returns the known shapes and contents of values.

    It is implemented by :class:`inferences.Inference`.
    """

    def shape(self, value: ir.Value) -> Dims | None:
        """Return a value's dimensions, or ``None`` if their number is not known."""

    def content(self, value: ir.Value | None) -> np.ndarray | None:
        """Return a value's elements, or ``None`` if they are not known."""


def _reshape(known: Known, node: ir.Node) -> list[Dims] | None:
    source, target = known.shape(_first(node)), known.content(node.inputs[1])
    if target is None:
        return None
    dims: Dims = list(target.reshape(-1))
    dims = [dim if isinstance(dim, Dim) else int(dim) for dim in dims]
    if not node.attributes.get_int("allowzero", 0):
        if source is None and 0 in dims:
            return None
        dims = [source[i] if d == 0 and source is not None else d for i, d in enumerate(dims)]
    if -1 not in dims:
        return [dims]
    if source is None:
        return None
    place = dims.index(-1)
    rest = [*dims[:place], *dims[place + 1 :]]
    dims[place] = divide_exactly(prod_of(source), prod_of(rest))
    return [dims]


def _expand(known: Known, node: ir.Node) -> list[list[Amount | None]] | None:
    source, target = known.shape(_first(node)), known.content(node.inputs[1])
    if source is None or target is None:
        return None
    wanted: Dims = [d if isinstance(d, Dim) else int(d) for d in target.reshape(-1)]
    rank = max(len(source), len(wanted))
    pairs = zip(_pad(source, rank), _pad(wanted, rank), strict=True)
    return [[_broadcast(own, other) for own, other in pairs]]


def _pad(dims: Dims, rank: int) -> Dims:
    return [*[1] * (rank - len(dims)), *dims]


def _broadcast(left: Amount, right: Amount) -> Amount | None:
    if left == right or right == 1:
        return left
    if left == 1:
        return right
    numbers = [d for d in (left, right) if isinstance(d, int)]
    return numbers[0] if len(numbers) == 1 else None  # the symbol is 1 or this number


def _constant_of_shape(known: Known, node: ir.Node) -> list[Dims] | None:
    target = known.content(node.inputs[0])
    if target is None:
        return None
    return [[d if isinstance(d, Dim) else int(d) for d in target.reshape(-1)]]


def _range(known: Known, node: ir.Node) -> list[list[Amount | None]] | None:
    start, limit, delta = (known.content(value) for value in node.inputs)
    if start is None or limit is None or delta is None:
        return None
    kinds = {content.dtype.kind for content in (start, limit, delta)}
    if "f" in kinds or delta.dtype == object:
        return None
    if start.dtype != object and limit.dtype != object:
        return [[max(0, -(-(int(limit) - int(start)) // int(delta)))]] if int(delta) else None
    length = limit.reshape(-1)[0] - start.reshape(-1)[0]
    return [[length]] if int(delta) == 1 and not is_less(length, 0) else None


def _concat(known: Known, node: ir.Node) -> list[list[Amount | None]] | None:
    shapes = [known.shape(value) for value in node.inputs if value is not None]
    first = shapes[0]
    if first is None or any(dims is None or len(dims) != len(first) for dims in shapes):
        return None
    axis = node.attributes.get_int("axis") % len(first)
    result: list[Amount | None] = []
    for place in range(len(first)):
        along = [dims[place] for dims in shapes if dims is not None]
        numbers = [dim for dim in along if isinstance(dim, int)]
        if place == axis:
            result.append(sum_of(along))
        else:  # all must be the same
            result.append(numbers[0] if numbers else along[0])
    return [result]


def _einsum(known: Known, node: ir.Node) -> list[Dims] | None:
    shapes = [known.shape(value) for value in node.inputs if value is not None]
    output = node.outputs[0]
    noted = [d if isinstance(d, int) else d.value for d in output.shape or ()]
    equation = node.attributes.get_string("equation") or ""
    found = spread_operands(equation, shapes, noted, output.name or "")
    return None if found is None else [found]


def spread_operands(
    equation: str,
    shapes: Sequence[Sequence[Amount] | None],
    declared: Sequence[int | str | None],
    name: str,
) -> Dims | None:
    """Return the dimensions of an Einsum's result ``name``, or ``None`` if they are not known.

    Operands are broadcast along an axis where their size is 1.  onnx takes the size of the first
    operand instead, and the ``declared`` dimensions of the result may come from onnx.  A declared
    symbol is therefore not used if it is that of one operand while the model names another for
    another operand.
    """
    known = [shape for shape in shapes if shape is not None]
    read = read_equation(equation, [len(shape) for shape in known])
    if len(known) != len(shapes) or read is None:
        return None
    sizes: dict[str, list[Amount]] = {}
    for term, shape in zip(read[0], known, strict=True):
        for label, size in zip(term, shape, strict=True):
            sizes.setdefault(label, []).append(size)
    if not sizes.keys() >= {*read[1]}:
        return None
    result: Dims = []
    for axis, label in enumerate(read[1]):
        dim = _join(sizes[label])
        noted = declared[axis] if len(declared) == len(read[1]) else None
        if dim is None and isinstance(noted, str) and noted:
            own = parse_dim(noted)
            is_doubtful = own in sizes[label] and not any(map(is_unknown, sizes[label]))
            dim = None if is_doubtful else own
        result.append(name_unknown(name, axis) if dim is None else dim)
    return result


def _join(sizes: Sequence[Amount]) -> Amount | None:
    """Return the size that operands are broadcast to along an axis, or ``None`` if not certain."""
    others = [dim for dim in dict.fromkeys(sizes) if dim != 1]
    numbers = [dim for dim in others if isinstance(dim, int)]
    if not others:
        return 1
    return numbers[0] if numbers else others[0] if len(others) == 1 else None


Labels = tuple[str, ...]


def read_equation(equation: str, ranks: Sequence[int]) -> tuple[list[Labels], Labels] | None:
    """Return the labels of the axes of each operand of an Einsum, and of its result.

    The axes that an ellipsis stands for are labelled ``...0``, ``...1`` and so on, from the last
    axis to the first.  Return ``None`` if the equation does not fit operands of these ranks.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    spelled = left.split(",")
    if len(spelled) != len(ranks):
        return None
    terms = []
    for term, rank in zip(spelled, ranks, strict=True):
        hidden = rank - len(term.replace("...", ""))
        if hidden < 0 or (hidden and "..." not in term):
            return None
        terms.append(_spell(term, hidden))
    most = max(sum(label.startswith("...") for label in term) for term in terms)
    if arrow:
        return terms, _spell(right, most)
    every = [label for term in terms for label in term]
    named_once = sorted(label for label in {*every} if every.count(label) == 1 and label[0] != ".")
    return terms, (*_spell("...", most), *named_once)


def _spell(term: str, hidden: int) -> Labels:
    """Return the labels of a term's axes; its ellipsis stands for ``hidden`` axes."""
    labels: list[str] = []
    for piece in re.findall(r"\.\.\.|.", term):
        labels += [f"...{i}" for i in reversed(range(hidden))] if piece == "..." else [piece]
    return tuple(labels)


def _flatten(known: Known, node: ir.Node) -> list[Dims] | None:
    dims = known.shape(_first(node))
    if dims is None:
        return None
    axis = node.attributes.get_int("axis", 1)
    axis = axis + len(dims) if axis < 0 else axis
    return [[prod_of(dims[:axis]), prod_of(dims[axis:])]]


def _tile(known: Known, node: ir.Node) -> list[Dims] | None:
    dims, repeats = known.shape(_first(node)), known.content(node.inputs[1])
    if dims is None or repeats is None:
        return None
    pairs = zip(dims, repeats, strict=True)
    return [[multiply(d, r if isinstance(r, Dim) else int(r)) for d, r in pairs]]


def _slice(known: Known, node: ir.Node) -> list[list[Amount | None]] | None:
    dims = known.shape(_first(node))
    if dims is None or len(node.inputs) < 3:
        return None
    settings = [known.content(value) for value in node.inputs[1:]]
    if any(c is None and v is not None for c, v in zip(settings, node.inputs[1:], strict=True)):
        return None
    starts, ends = settings[0], settings[1]
    assert starts is not None
    assert ends is not None
    axes = settings[2] if len(settings) > 2 and settings[2] is not None else range(len(starts))
    steps = settings[3] if len(settings) > 3 and settings[3] is not None else [1] * len(starts)
    result: list[Amount | None] = list(dims)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        result[int(axis)] = _measure(dims[int(axis)], start, end, step)
    return [result]


def _measure(dim: Amount, start: Any, end: Any, step: Any) -> Amount | None:
    """Return the length of a slice along a dimension, or ``None`` if it is not certain."""
    if all(not isinstance(a, Dim) for a in (dim, start, end, step)):
        return len(range(*slice(int(start), int(end), int(step)).indices(int(str(dim)))))
    try:
        if is_equal(step, -1) and is_equal(start, -1) and is_less(end, -(2**31)):
            return dim
        if not is_equal(step, 1):
            return None
        if start == end:
            return 0
        extent = _clamp(dim, end) - _clamp(dim, start)
    except Undecided:
        return None
    if is_natural(extent):
        return extent
    return 0 if is_natural(-extent) else None


def _clamp(dim: Amount, place: Any) -> Amount:
    """Convert the start or end of a slice to a position from 0 to ``dim``."""
    place = place if isinstance(place, Dim) else int(place)
    if isinstance(place, int) and place >= 2**31 - 1:
        return dim
    if is_less(place, 0):
        return 0 if is_less(dim + place, 0) else dim + place
    return dim if is_less(dim, place) else place


def _first(node: ir.Node) -> ir.Value:
    assert node.inputs[0] is not None
    return node.inputs[0]


Rule = Callable[[Known, ir.Node], Sequence[Sequence[Amount | None]] | None]


def _keep(known: Known, node: ir.Node) -> list[Dims] | None:
    """Return the shape of the first input, for operators that onnx's inference does not cover."""
    source = known.shape(_first(node))
    return None if source is None else [source]


RULES: Mapping[str, Rule] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "GroupNormalization": _keep,
    "MeanVarianceNormalization": _keep,
    "Range": _range,
    "Reshape": _reshape,
    "Slice": _slice,
    "Tile": _tile,
}
