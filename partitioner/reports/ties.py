"""Find parameters that hold the same numbers, perhaps because an export stored one of them twice.

Many language models use one matrix as the embedding and, transposed, as the output layer.
Exporters may store the transposed matrix as a separate tensor.  The two tensors are then trained
independently.  If the output layer uses only some rows of the embedding, one tensor is a block of
the other; ``--tie`` cannot join two such tensors.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.cutting.passes.ties import find_difference, is_symmetric
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.reports.layers import name_layer
from splitonnx.partitioner.reports.remarks import Kind, Remark, make_option

_FEWEST = 4
"""In tensors with fewer elements than this, equal numbers may be a coincidence."""
_HIGHEST_RANK = 4
_WAYS = {
    "equal": "",
    "transposed": " (transposed)",
    "symmetric": " (as it is and transposed; --tie takes it as it is)",
}
"""How two tensors can hold the same numbers, in words."""
_NUMBERED = re.compile(r"((layers?|blocks?|cells?|h)_)?\d+")
"""A part of a name that numbers a layer."""


def remark_on_ties(prepared: PreparedModel, computed: Collection[str]) -> Iterator[Remark]:
    """Yield a remark for each set of trained parameters that hold the same numbers.

    Then, yield a remark for each matrix that equals the first or last rows or columns of another.

    Parameters are left out if all their elements are equal, or if ``computed`` contains their names
    because they were probably not learned.  Corresponding parameters of numbered layers, such as
    ``layers.0`` and ``layers.1``, are left out as well, because frameworks may initialize such
    layers as copies of one layer.
    """
    for group in _group(prepared, computed):
        first, *others = group
        ways = [_compare(prepared.weights[first], prepared.weights[other]) for other in others]
        again = [f"'{other}'{_WAYS[way]}" for other, way in zip(others, ways, strict=True)]
        pairs, difference = _pair(prepared, group)
        yield Remark(
            kind=Kind.LOST_TIE,
            sentence=f"'{first}' and {', '.join(again)} hold the same numbers but are trained "
            f"apart: {_advise(difference, has_pairs=bool(pairs))}",
            names=tuple(group),
            options=tuple(make_option("--tie", f"{one}={other}") for one, other in pairs),
        )
    yield from _remark_on_blocks(prepared, computed)


def _pair(prepared: PreparedModel, group: Sequence[str]) -> tuple[list[tuple[str, str]], str]:
    """Return the pairs of parameters that ``cut`` can tie, and why it cannot tie the others."""
    given = {value.name: value.dtype for value in prepared.skeleton.graph.inputs}
    kept: list[str] = []
    pairs: list[tuple[str, str]] = []
    difference = ""
    for name in group:
        for one in kept:
            reason = find_difference(
                *(_restore(prepared.weights[each], given[each]) for each in (one, name))
            )
            if not reason:
                pairs.append((one, name))
                break
            difference = difference or f"of '{one}' and '{name}', {reason}"
        else:
            kept.append(name)
    return pairs, difference if len(kept) > 1 else ""


def _restore(tensor: ir.TensorProtocol, dtype: ir.DataType | None) -> np.ndarray:
    """Return a parameter in the element type of the model given, as ``cut`` reads it for a tie."""
    array: np.ndarray = tensor.numpy()
    return array if dtype is None else array.astype(dtype.numpy())


def _advise(difference: str, *, has_pairs: bool) -> str:
    if not difference:
        return "tie them if the model had one parameter here"
    if has_pairs:
        return (
            f"tie them if the model had one parameter here, but not all can be tied: {difference}"
        )
    return (
        f"if the model had one parameter here, export it with one, because cut cannot tie them: "
        f"{difference}"
    )


def _group(prepared: PreparedModel, computed: Collection[str]) -> Iterator[list[str]]:
    sizes = defaultdict[tuple[object, ...], list[str]](list)
    for name in prepared.trainable:
        tensor = prepared.weights[name]
        if tensor.size >= _FEWEST and name not in computed:
            sizes[tensor.dtype, tensor.size].append(name)
    alike = defaultdict[tuple[object, ...], list[str]](list)
    for key, names in sizes.items():
        for name in names if len(names) > 1 else ():
            array = prepared.weights[name].numpy()
            if array.min() != array.max():
                alike[*key, _sum_bits(array)].append(name)
    places = {value.name or "": value for value in prepared.skeleton.graph.inputs}
    for rest in alike.values():
        while len(rest) > 1:
            first = rest[0]
            same = [n for n in rest[1:] if _compare(prepared.weights[first], prepared.weights[n])]
            rest = [name for name in rest[1:] if name not in same]
            tied = [n for n in same if not _are_copies(places[first], places[n])]
            if tied:
                yield [first, *tied]


def _sum_bits(array: np.ndarray) -> int:
    """Return a checksum of an array's numbers that does not depend on their order."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
    return int(bits.sum(dtype=np.uint64))


def _compare(one: ir.TensorProtocol, other: ir.TensorProtocol) -> str:
    """Return how two tensors agree, as a key of :data:`_WAYS`, or an empty string otherwise."""
    first, second = one.numpy(), other.numpy()
    if np.array_equal(first.reshape(-1), second.reshape(-1)):
        return "symmetric" if is_symmetric(first) else "equal"
    first, second = first.squeeze(), second.squeeze()
    if first.ndim != second.ndim or first.ndim > _HIGHEST_RANK:
        return ""
    orders = (order for order in permutations(range(first.ndim)) if order != (0,))
    return "transposed" if any(_matches(first, second, order) for order in orders) else ""


def _matches(first: np.ndarray, second: np.ndarray, order: tuple[int, ...]) -> bool:
    turned = first.transpose(order)
    return turned.shape == second.shape and np.array_equal(turned, second)


def _are_copies(one: ir.Value, other: ir.Value) -> bool:
    """Return whether two weights are corresponding weights of two numbered layers."""
    places = [name_layer(value).replace("/", ".").split(".") for value in (one, other)]
    if len(places[0]) != len(places[1]):
        return False
    different = [pair for pair in zip(*places, strict=True) if pair[0] != pair[1]]
    numbered = all(all(map(_NUMBERED.fullmatch, pair)) for pair in different)
    shapes = [value.shape.numpy() if value.shape is not None else () for value in (one, other)]
    return bool(different) and numbered and shapes[0] == shapes[1] and math.prod(shapes[0]) > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Matrix:
    """A parameter of two dimensions, perhaps transposed."""

    name: str
    array: np.ndarray
    is_transposed: bool

    def make_key(self, *, leading: bool) -> tuple[object, ...] | None:
        """Return what two matrices share if they share their first, or else last, two rows.

        Return ``None`` if all elements of these rows are equal, which may be a coincidence.
        """
        rows = self.array[:2] if leading else self.array[-2:]
        if rows.min() == rows.max():
            return None
        return leading, rows.dtype.str, rows.shape, hash(rows.tobytes())

    def holds(self, block: _Matrix, *, leading: bool) -> bool:
        """Return whether ``block`` equals the first, or else the last, rows of this matrix."""
        count = len(block.array)
        if self.name == block.name or count >= len(self.array):
            return False
        rows = self.array[:count] if leading else self.array[-count:]
        return np.array_equal(rows, block.array)


def _remark_on_blocks(prepared: PreparedModel, computed: Collection[str]) -> Iterator[Remark]:
    """Yield a remark for each matrix that equals the first or last rows or columns of another.

    The block may be transposed.  Matrices are left out if ``computed`` contains their names.  Only
    the first and last two rows and columns of each matrix are read, and more only if they agree.
    """
    matrices = [
        matrix
        for name in prepared.trainable
        if name not in computed
        for matrix in _read_matrix(prepared, name)
    ]
    alike = defaultdict[tuple[object, ...], list[_Matrix]](list)
    for matrix in matrices:
        for key in (matrix.make_key(leading=True), matrix.make_key(leading=False)):
            if key is not None:
                alike[key].append(matrix)
    told: set[tuple[str, str]] = set()
    for key, group in alike.items():
        leading = bool(key[0])
        for block, whole in permutations(group, 2):
            pair = (block.name, whole.name)
            if pair not in told and whole.holds(block, leading=leading):
                told.add(pair)
                yield _remark_on_block(block, whole, "first" if leading else "last")


def _read_matrix(prepared: PreparedModel, name: str) -> list[_Matrix]:
    """Return a parameter of two dimensions, besides those of size 1, and its transpose."""
    tensor = prepared.weights[name]
    if sum(dim > 1 for dim in tensor.shape.numpy()) != 2:
        return []
    array = tensor.numpy().squeeze()
    return [
        _Matrix(name=name, array=array, is_transposed=False),
        _Matrix(name=name, array=array.T, is_transposed=True),
    ]


def _remark_on_block(block: _Matrix, whole: _Matrix, place: str) -> Remark:
    lines = "columns" if whole.is_transposed else "rows"
    turned = " (transposed)" if block.is_transposed != whole.is_transposed else ""
    return Remark(
        kind=Kind.LOST_TIE,
        sentence=f"'{block.name}' holds the same numbers as the {place} {len(block.array)} {lines} "
        f"of '{whole.name}'{turned}, but they are trained apart: --tie joins only whole "
        "parameters; if the model had one parameter here, export it so that the file stores it "
        "once",
        names=(block.name, whole.name),
    )
