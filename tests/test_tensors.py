"""What is declared of a tensor, and arrays that are checked against it."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import ArrayMismatch, BatchTooLarge, ValueOutOfRange
from splitonnx.tensors import (
    DTYPES,
    LARGEST,
    TensorSpec,
    check_array,
    check_rows,
    describe,
    name_dtype,
)


def spec(*shape: int | str | None, dtype: str = "F32", **more: tuple[int, int]) -> TensorSpec:
    return TensorSpec(name="x", dtype=dtype, shape=shape, **more)


def zeros(*shape: int, dtype: str = "f4") -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize("name", DTYPES)
def test_every_element_type_has_one_name(name: str) -> None:
    assert name_dtype(DTYPES[name]) == name
    assert DTYPES[name].byteorder in "=|<"


def test_what_cannot_travel_goes_by_numpy_s_name() -> None:
    assert name_dtype(np.dtype("c8")) == "complex64"
    assert name_dtype(np.dtype(">f4")) == ">f4"


def test_tensors_are_told_in_the_same_words_declared_or_there() -> None:
    assert str(spec("N", 3, None)) == "F32[N, 3, ?]"
    assert describe(zeros(2, 3)) == "F32[2, 3]"


def test_a_name_is_bound_by_the_first_array_and_holds_for_the_next() -> None:
    sizes: dict[str, int] = {}
    check_array(zeros(4, 3), spec("N", 3), sizes)
    assert sizes == {"N": 4}
    check_array(zeros(4), spec("N"), sizes)
    with pytest.raises(ArrayMismatch) as caught:
        check_array(zeros(5, 3), spec("N", 3), sizes)
    assert "N = 4" in caught.value.expected
    assert caught.value.actual == "F32[5, 3]"
    assert sizes == {"N": 4}


@pytest.mark.parametrize(
    "array", [zeros(4, 2), zeros(4), zeros(4, 3, 1), zeros(4, 3, dtype="f8"), zeros(0, 3)]
)
def test_another_shape_or_type_is_refused_and_binds_nothing(array: np.ndarray) -> None:
    sizes: dict[str, int] = {}
    with pytest.raises(ArrayMismatch):
        check_array(array, spec("N", 3), sizes)
    assert sizes == {}


def test_an_expression_is_computed_or_solved_for_its_one_unknown() -> None:
    sizes = {"N": 3}
    check_array(zeros(13), spec("4*N + 1"), sizes)
    with pytest.raises(ArrayMismatch):
        check_array(zeros(12), spec("4*N + 1"), sizes)
    solved: dict[str, int] = {}
    check_array(zeros(13), spec("4*N + 1"), solved)
    assert solved["N"] == 3
    with pytest.raises(ArrayMismatch):
        check_array(zeros(14), spec("4*N + 1"), {})  # no whole number solves it


def test_names_are_bound_before_the_expressions_that_need_them() -> None:
    sizes: dict[str, int] = {}
    check_array(zeros(6, 2), spec("2*N + M", "N"), sizes)
    assert (sizes["N"], sizes["M"]) == (2, 2)


def test_a_dimension_of_any_size_binds_nothing_but_is_not_empty() -> None:
    sizes: dict[str, int] = {}
    check_array(zeros(7), spec(None), sizes)
    assert sizes == {}
    with pytest.raises(ArrayMismatch):
        check_array(zeros(0), spec(None), sizes)


def test_only_an_output_of_the_model_may_be_empty() -> None:
    """Native kernels trust in that."""
    with pytest.raises(ArrayMismatch, match="empty"):
        check_array(zeros(0, 3), spec("N", 3), {})
    sizes: dict[str, int] = {}
    check_array(zeros(0, 3), spec("found", 3), sizes, is_output=True)
    assert sizes == {"found": 0}
    with pytest.raises(ArrayMismatch):
        check_array(zeros(0, 3), spec("N", 3), {"N": 4}, is_output=True)


def test_a_dimension_ends_where_32_bits_do() -> None:
    array = np.lib.stride_tricks.as_strided(zeros(1), (LARGEST + 1,), (0,))
    with pytest.raises(ArrayMismatch):
        check_array(array, spec("N"), {})


@pytest.mark.parametrize(("value", "is_in"), [(-1, False), (0, True), (9, True), (10, False)])
def test_integers_lie_within_their_bounds(value: int, is_in: bool) -> None:
    labels = np.array([3, value], np.int64)
    declared = spec("N", dtype="I64", bounds=(0, 10))
    if is_in:
        check_array(labels, declared, {})
        return
    with pytest.raises(ValueOutOfRange) as caught:
        check_array(labels, declared, {})
    assert (caught.value.value, caught.value.lower, caught.value.upper) == (value, 0, 10)


def test_rows_are_limited_where_the_model_leaves_their_number_free() -> None:
    check_rows(zeros(8, 3), spec("N", 3), 8)
    with pytest.raises(BatchTooLarge) as caught:
        check_rows(zeros(9, 3), spec("N", 3), 8)
    assert (caught.value.name, caught.value.rows, caught.value.limit) == ("x", 9, 8)
    check_rows(zeros(9, 3), spec(9, 3), 8)
    check_rows(zeros(), spec(), 8)
