"""Rules for shapes that come from contents: held against numpy's own, and open where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from splitonnx.partitioner.inference.dimensions import (
    Amount,
    Dim,
    Undecided,
    list_terms,
    make_atom,
    name_unknown,
)
from splitonnx.partitioner.inference.shape_rules import RULES, read_equation, spread_operands

N, T = make_atom("N"), make_atom("T")
LARGE = 2**63 - 1


class Notes:
    """What is known of values: shapes, and contents as arrays of numbers or of amounts."""

    def __init__(
        self, shapes: Mapping[str, Sequence[Amount] | None], contents: Mapping[str, Any]
    ) -> None:
        self._shapes = shapes
        self._contents = {name: hold(content) for name, content in contents.items()}

    def shape(self, value: ir.Value) -> list[Amount] | None:
        dims = self._shapes.get(value.name or "")
        return None if dims is None else list(dims)

    def content(self, value: ir.Value | None) -> np.ndarray | None:
        return None if value is None else self._contents.get(value.name or "")


def hold(content: Any) -> np.ndarray:
    array = np.array(content, object)
    symbolic = any(isinstance(element, Dim) for element in array.reshape(-1))
    return array if symbolic else np.array(content)


def apply(
    kind: str,
    *names: str,
    x: Sequence[Amount] | None = None,
    contents: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[Amount] | None] | None = None,
    **attributes: Any,
) -> list[Amount | None] | None:
    node = ir.node(kind, [ir.Value(name=name) for name in names], attributes, name="node")
    found = RULES[kind](Notes({"x": x, **(shapes or {})}, contents or {}), node)
    return None if found is None else list(found[0])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ([0, -1], [N, T * 6]),
        ([-1, 6], [N * T, 6]),
        ([N, T, 2, 3], [N, T, 2, 3]),
        ([N, -1, 3], [N, T * 2, 3]),
        ([0, 0, 6], [N, T, 6]),
    ],
)
def test_a_reshape_keeps_the_symbols_of_its_target(
    target: list[Amount], expected: list[Amount]
) -> None:
    assert apply("Reshape", "x", "to", x=[N, T, 6], contents={"to": target}) == expected


def test_a_reshape_that_may_leave_a_rest_is_undecided() -> None:
    with pytest.raises(Undecided):
        apply("Reshape", "x", "to", x=[N, 6], contents={"to": [4, -1]})


def test_a_zero_is_one_where_it_is_allowed() -> None:
    found = apply("Reshape", "x", "to", x=[N, 0], contents={"to": [0, 3]}, allowzero=1)
    assert found == [0, 3]


@pytest.mark.parametrize("kind", ["Reshape", "Expand", "Tile"])
def test_nothing_is_said_of_a_target_that_is_not_known(kind: str) -> None:
    assert apply(kind, "x", "to", x=[N, 6]) is None
    assert apply("ConstantOfShape", "to") is None


@pytest.mark.parametrize(
    ("x", "target", "expected"),
    [
        ([1, 3], [N, 3], [N, 3]),
        ([N, 1], [1, 4], [N, 4]),
        ([3], [2, N, 1], [2, N, 3]),
        ([N], [T], [None]),
        ([N], [3], [3]),  # N can only be 1 or 3
    ],
)
def test_an_expansion_broadcasts(
    x: list[Amount], target: list[Amount], expected: list[Amount | None]
) -> None:
    assert apply("Expand", "x", "to", x=x, contents={"to": target}) == expected


@pytest.mark.parametrize("bounds", [(0, 7, 2), (5, 0, -2), (3, 3, 1), (4, 0, 1), (-2, 9, 3)])
def test_a_range_is_as_long_as_pythons(bounds: tuple[int, int, int]) -> None:
    contents = dict(zip(("a", "b", "c"), bounds, strict=True))
    assert apply("Range", "a", "b", "c", contents=contents) == [len(range(*bounds))]


def test_a_range_of_symbols_is_their_difference_where_that_is_no_less_than_zero() -> None:
    assert apply("Range", "a", "b", "c", contents={"a": 0, "b": N + 1, "c": 1}) == [N + 1]
    assert apply("Range", "a", "b", "c", contents={"a": 0, "b": N, "c": 2}) is None
    assert apply("Range", "a", "b", "c", contents={"a": 0.0, "b": 3.0, "c": 1.0}) is None
    assert apply("Range", "a", "b", "c", contents={"a": 0, "b": 3, "c": 0}) is None
    with pytest.raises(Undecided):
        apply("Range", "a", "b", "c", contents={"a": T, "b": N, "c": 1})


def test_a_concatenation_adds_along_its_axis_and_learns_along_the_others() -> None:
    shapes: dict[str, list[Amount]] = {"x": [N, T, 6], "y": [N, 2, 6]}
    assert apply("Concat", "x", "y", shapes=shapes, axis=1) == [N, T + 2, 6]
    assert apply("Concat", "x", "y", shapes=shapes, axis=-2) == [N, T + 2, 6]
    assert apply("Concat", "x", "y", shapes={"x": [N, 2], "y": [5, 3]}, axis=1) == [5, 5]
    assert apply("Concat", "x", "y", shapes={"x": [N, 2], "y": None}, axis=1) is None


@pytest.mark.parametrize(
    ("axis", "expected"), [(1, [N, T * 6]), (0, [1, N * T * 6]), (3, [N * T * 6, 1]),
                           (-1, [N * T, 6])],
)  # fmt: skip
def test_flattening_multiplies(axis: int, expected: list[Amount]) -> None:
    assert apply("Flatten", "x", x=[N, T, 6], axis=axis) == expected


def test_tiling_multiplies_each_dimension() -> None:
    assert apply("Tile", "x", "to", x=[N, 3], contents={"to": [2, T]}) == [N * 2, T * 3]


@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize(
    ("start", "end", "step"),
    [(0, 3, 1), (1, LARGE, 1), (-3, -1, 1), (4, 0, -1), (-1, -LARGE, -1), (0, 9, 2), (3, 1, 1)],
)
def test_a_slice_of_a_known_size_is_pythons(size: int, start: int, end: int, step: int) -> None:
    contents = {"s": [start], "e": [end], "a": [1], "t": [step]}
    found = apply("Slice", "x", "s", "e", "a", "t", x=[N, size], contents=contents)
    assert found == [N, len(range(size)[start:end:step])]


@pytest.mark.parametrize(
    ("start", "end", "step", "expected"),
    [
        (0, LARGE, 1, N + 4),
        (1, LARGE, 1, N + 3),
        (0, -1, 1, N + 3),
        (-2, LARGE, 1, 2),
        (0, N, 1, N),
        (-1, -LARGE, -1, N + 4),
        (2, 2, 1, 0),
        (N + 2, N + 1, 1, 0),
        (N + 1, N + 3, 1, 2),
        (0, 9, 1, None),  # N + 4 or 9, whichever is less
        (0, LARGE, 2, None),
    ],
)
def test_a_slice_of_a_symbol_is_said_where_it_is_certain(
    start: Amount, end: Amount, step: int, expected: Amount | None
) -> None:
    contents = {"s": [start], "e": [end], "a": [0], "t": [step]}
    assert apply("Slice", "x", "s", "e", "a", "t", x=[N + 4], contents=contents) == [expected]


def test_normalizations_keep_the_shape() -> None:
    assert apply("GroupNormalization", "x", x=[N, 4, T]) == [N, 4, T]
    assert apply("MeanVarianceNormalization", "x") is None


def test_a_constant_has_the_shape_that_is_its_content() -> None:
    assert apply("ConstantOfShape", "to", contents={"to": [N, 3]}) == [N, 3]
    found = apply("ConstantOfShape", "to", contents={"to": [2, 3]})
    assert found == [2, 3]
    assert all(list_terms(dim) for dim in found if dim is not None)


@pytest.mark.parametrize(
    ("first", "second", "declared", "expected"),
    [
        ([N, 5], [N, 5], [None, None], [N, 5]),
        ([1, 5], [N, 5], ["T", 5], [N, 5]),
        ([N, 1], [N, 5], ["N", 1], [N, 5]),
        ([N, 5], [T, 5], ["N", 5], [name_unknown("y", 0), 5]),
        ([N, 5], [T, 5], ["K", 5], [make_atom("K"), 5]),
        ([N, 5], [name_unknown("b", 0), 5], ["N", 5], [N, 5]),
        ([N, 5], [T, 5, 5], [], None),
    ],
)
def test_operands_of_an_einsum_are_broadcast_to_one_another(
    first: list[Amount], second: list[Amount], declared: list[Any], expected: list[Amount] | None
) -> None:
    assert spread_operands("ij,ij->ij", [first, second], declared, "y") == expected


def test_an_equation_is_read_to_the_labels_of_each_axis() -> None:
    read = read_equation("i...j, jk", [4, 2])
    assert read == ([("i", "...1", "...0", "j"), ("j", "k")], ("...1", "...0", "i", "k"))
    assert read_equation("ij,jk", [2]) is None
