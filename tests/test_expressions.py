"""Symbolic dimensions as text are read, evaluated and bound as the sums that they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitonnx.errors import ArrayMismatch
from splitonnx.expressions import (
    describe_size,
    evaluate,
    find_unbound,
    parse_terms,
    solve_for,
)
from splitonnx.partitioner.inference.dimensions import Dim, divide_rounding, make_atom, parse_dim
from splitonnx.tensors import LARGEST, TensorSpec, check_array

N, T, H = make_atom("N"), make_atom("T"), make_atom("H")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("7", 7),
        ("N", 3),
        ("2*N", 6),
        ("2 * N * T", 30),
        ("N*T + 4*N + 1", 28),
        ("N + -1", 2),
        ("-1*N + T", 2),
        ("(T)//(2)", 2),
        ("(T + -1)//(2) + 1", 3),
        ("2*(T)//(2)*N", 12),
        ("((T)//(2) + 1)//(3)", 1),
        ("unk__/layer.1/Conv:2", None),
        ("N + unk__/layer.1/Conv:2", None),
        ("N - 1", None),
        ("floor(N/2)", None),
        ("(N)//(0)", None),
        ("N + ", None),
        ("((((", None),
        ("", None),
    ],
)
def test_a_text_is_evaluated_as_a_sum_of_products(text: str, size: int | None) -> None:
    assert evaluate(text, {"N": 3, "T": 5}) == size


@pytest.mark.parametrize("text", ["N - 1", "floor(N/2)", "N + ", "(N)", "N//2", "a b", ")(", "("])
def test_a_text_that_is_no_sum_is_one_name(text: str) -> None:
    assert parse_terms(text) == (((text,), 1),)
    assert evaluate(text, {text: 4}) == 4


@given(st.text("N1*+-/() ", max_size=30))
def test_whatever_an_exporter_writes_is_read(text: str) -> None:
    evaluate(text, {"N": 2})
    assert find_unbound(text, {text: 1, "N": 2}) is not None


@pytest.mark.parametrize(
    "dim",
    [N * 4 + 1, N * T + N + 2, N - 1, T - N, divide_rounding(N + 3, 2) * 6 + 1,
     divide_rounding(divide_rounding(N + 1, 2) + 2, 3) * T],
)  # fmt: skip
def test_what_the_partitioner_writes_is_read_back(dim: Dim) -> None:
    assert parse_dim(str(dim)) == dim


def test_a_name_is_found_from_the_size_of_a_dimension_that_it_occurs_in_linearly() -> None:
    assert solve_for("N", "4*N + 1", 9, {}) == 2
    assert solve_for("N", "4*N + 1", 10, {}) is None
    assert solve_for("N", "N*T + T", 10, {"T": 5}) == 1
    assert solve_for("N", "N*N", 9, {}) is None


def bind(sizes: dict[str, int], *pairs: tuple[str | int | None, int]) -> dict[str, int]:
    """Check a tensor of such dimensions and sizes; the tensor takes no memory."""
    spec = TensorSpec(name="h", dtype="F32", shape=tuple(dim for dim, _ in pairs))
    array = np.broadcast_to(np.float32(0), tuple(size for _, size in pairs))
    check_array(array, spec, sizes)
    return sizes


def test_a_dimension_binds_its_names_for_the_rest_of_the_task() -> None:
    sizes = bind({}, ("N", 3), ("2*T + 1", 9), ("N*T", 12), ("A*B", 6), ("(H + -1)//(2) + 1", 1))
    assert sizes == {"N": 3, "T": 4, "A*B": 6, "(H + -1)//(2)": 0}
    for pair in (("N", 2), ("T", 5), ("N*T", 13), ("A*B", 5), ("(H + -1)//(2) + 1", 2)):
        with pytest.raises(ArrayMismatch, match="where"):
            bind(dict(sizes), pair)


def test_names_are_bound_before_the_expressions_of_them() -> None:
    assert bind({}, ("N*M", 6), ("N", 2)) == {"N": 2, "M": 3}


def test_a_tensor_that_does_not_fit_binds_nothing() -> None:
    sizes: dict[str, int] = {"N": 3}
    with pytest.raises(ArrayMismatch):
        bind(sizes, ("T", 4), ("N", 2))
    assert sizes == {"N": 3}


@pytest.mark.parametrize("pairs", [[("A", 2), ("B", 2)], [("B", 3), ("A", 2), ("H", 9)]])
def test_an_expression_holds_for_names_that_are_bound_after_it(
    pairs: list[tuple[str, int]],
) -> None:
    sizes = bind({}, ("A*B", 6), ("(H)//(2)", 3))
    with pytest.raises(ArrayMismatch):
        bind(sizes, *pairs)
    bind(sizes, ("A", 2), ("B", 3), ("H", 7))


@pytest.mark.parametrize(
    "pair",
    [("N", 0), ("N", LARGEST + 1), (None, 0), ("unk__3", 0), ("N + 1", 1), ("2*N", 3), ("2*N", 0)],
)
def test_a_symbolic_dimension_is_at_least_one(pair: tuple[str | None, int]) -> None:
    with pytest.raises(ArrayMismatch):
        bind({}, pair)


def test_a_dimension_that_is_declared_empty_may_be_empty() -> None:
    assert bind({}, (0, 0), ("N", 1), (None, 7), ("M", LARGEST)) == {"N": 1, "M": LARGEST}


def test_the_sentence_says_what_a_dimension_is_bound_to() -> None:
    with pytest.raises(ArrayMismatch, match=r"F32\[N, 4\*N\] where N = 2, but is F32\[2, 9\]"):
        bind({"N": 2, "T": 3}, ("N", 2), ("4*N", 9))
    with pytest.raises(ArrayMismatch, match=r"F32\[N, 4\] without an empty dimension"):
        bind({}, ("N", 0), (4, 4))


def test_quotients_that_nest_too_deep_are_one_name_and_end_nothing() -> None:
    text = "N"
    for _ in range(300):
        text = f"({text})//(1)"
    assert parse_terms(text[:2000]) == (((text[:2000],), 1),)
    assert evaluate(text, {"N": 3}) is None
    sizes: dict[str, int] = {}
    spec = TensorSpec(name="x", dtype="F32", shape=(text,))
    check_array(np.zeros(3, np.float32), spec, sizes)
    assert sizes == {text: 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("N_less_1 + 1", "N"),
        ("4*N_less_1 + 4", "4*N"),
        ("4*N_less_1*T + 4*T", "4*N*T"),
        ("N_less_1", "N + -1"),
        ("N_less_1 + -1", "N + -2"),
        ("N_less_1*N_less_1 + 2*N_less_1 + 1", "N*N"),
        ("(2*N_less_1 + 1)//(2) + 1", "(2*N + -1)//(2) + 1"),
        ("(N_less_1 + 1)//(2)", "(N)//(2)"),
        ("(H + -1)//(2) + 1", "(H + -1)//(2) + 1"),
        ("sizes of any kind", "sizes of any kind"),
        ("unk__/nms:0", "?"),
        ("2*unk__/nms:0 + N", "?"),
    ],
)
def test_a_reader_sees_the_batch_in_place_of_one_less(text: str, expected: str) -> None:
    assert describe_size(text) == expected
    if expected == "?":
        return
    for size in (2, 3, 7):
        sizes = {"N": size, "N_less_1": size - 1, "T": 5, "H": 9}
        assert evaluate(text, sizes) == evaluate(expected, sizes)
