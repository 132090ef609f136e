"""Dimensions are computed with as symbols, and compared only where it is provable."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

from splitonnx.partitioner.inference.dimensions import (
    MOST_TERMS,
    Amount,
    Dim,
    TooLarge,
    Undecided,
    divide_exactly,
    divide_rounding,
    is_equal,
    is_less,
    is_natural,
    is_positive,
    list_terms,
    make_atom,
    parse_dim,
    prod_of,
    solve,
    take_remainder,
)

N, T = make_atom("N"), make_atom("T")


def evaluate(amount: Amount, sizes: dict[str, int]) -> int:
    total = 0
    for atoms, factor in list_terms(amount):
        for atom in atoms:
            factor *= sizes[atom]
        total += factor
    return total


amounts = st.recursive(
    st.one_of(st.integers(-5, 5), st.just(N), st.just(T)),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
        inner.map(lambda amount: -amount),
    ),
    max_leaves=6,
)
sizes = st.fixed_dictionaries({"N": st.integers(0, 9), "T": st.integers(0, 9)})


@given(amounts, amounts, sizes)
def test_arithmetic_is_that_of_every_size(left: Amount, right: Amount, at: dict[str, int]) -> None:
    assert evaluate(left + right, at) == evaluate(left, at) + evaluate(right, at)
    assert evaluate(left - right, at) == evaluate(left, at) - evaluate(right, at)
    assert evaluate(left * right, at) == evaluate(left, at) * evaluate(right, at)
    assert evaluate(prod_of([left, right, 2]), at) == evaluate(left * right * 2, at)


@given(amounts, amounts, sizes)
def test_what_is_decided_holds_for_every_size(
    left: Amount, right: Amount, at: dict[str, int]
) -> None:
    one, other = evaluate(left, at), evaluate(right, at)
    assert not is_natural(left) or one >= 0
    assert not is_positive(left) or one >= 1
    for decide, truth in ((is_equal, one == other), (is_less, one < other)):
        try:
            assert decide(left, right) == truth
        except Undecided:
            continue


@given(amounts, st.one_of(st.integers(1, 4), st.just(N), st.just(N * T)), sizes)
def test_exact_division_is_the_inverse_of_multiplication(
    amount: Amount, divisor: Amount, at: dict[str, int]
) -> None:
    assume(amount != 0)  # nothing divided by a size that may be 0
    assert divide_exactly(amount * divisor, divisor) == amount
    try:
        quotient = divide_exactly(amount, divisor)
    except Undecided:
        return
    assert evaluate(quotient, at) * evaluate(divisor, at) == evaluate(amount, at)


@given(amounts)
def test_a_dimension_is_read_back_from_its_name(amount: Amount) -> None:
    if isinstance(amount, Dim) and all(factor > 0 for _, factor in amount.terms):
        assert parse_dim(str(amount)) == amount


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s77", make_atom("s77")),
        ("2*s77", make_atom("s77") * 2),
        ("s0*s1", make_atom("s0") * make_atom("s1")),
        ("s0 + 1", make_atom("s0") + 1),
        ("past_sequence_length + 1", make_atom("past_sequence_length") + 1),
        ("encoder-length", make_atom("encoder-length")),
        ("(s0//2)", make_atom("(s0//2)")),
        ("Max(1, s0)", make_atom("Max(1, s0)")),
    ],
)
def test_dimensions_are_read_as_exporters_write_them(text: str, expected: Amount) -> None:
    assert parse_dim(text) == expected


def test_sums_that_are_the_same_are_equal_however_they_came_about() -> None:
    assert (N + 1) * (N - 1) + 1 == N * N
    assert N - N == 0
    assert str(N * 2 + T * N + 3) == "2*N + N*T + 3"


def test_division_that_may_leave_a_remainder_is_a_size_of_its_own() -> None:
    half = divide_rounding(N + 1, 2)
    assert half == divide_rounding(1 + N, 2)
    assert str(half) == "(N + 1)//(2)"
    assert divide_rounding(N * 4, 2) == N * 2
    assert divide_rounding(-7, 2) == -3  # ONNX rounds towards zero
    assert take_remainder(N * 6, 3) == 0
    assert take_remainder(7, 3) == 1


@pytest.mark.parametrize(
    "undecided",
    [
        lambda: is_equal(N, 1),
        lambda: is_equal(N, T),
        lambda: is_less(N, T),
        lambda: is_less(0, N),  # a size may be 0
        lambda: divide_exactly(N, T),
        lambda: divide_rounding(N - 1, 2),  # it may be negative
        lambda: divide_rounding(1, 0),
        lambda: take_remainder(N, 2),
    ],
)
def test_what_depends_on_the_size_is_undecided(undecided: Callable[[], object]) -> None:
    with pytest.raises(Undecided):
        undecided()


def test_a_size_is_told_from_the_simplest_dimension_that_has_it() -> None:
    known: dict[str, Amount] = {"a": N * 2, "b": N + 1, "c": N, "d": N * T}
    assert solve(N * 3 + 1, known) == {"N": ("c", 1, 0)}
    del known["c"]
    assert solve(N, known) == {"N": ("b", 1, 1)}
    del known["b"]
    assert solve(N, known) == {"N": ("a", 2, 0)}
    assert solve(5, known) == {}
    with pytest.raises(Undecided, match="T"):
        solve(N + T, known)


def repeat(grow: Callable[[Amount], Amount], start: Amount) -> Amount:
    """Grow an amount until it is given up, and return the largest one before that."""
    amount = start
    for _ in range(40):
        try:
            amount = grow(amount)
        except TooLarge:
            return amount
    raise AssertionError("it was never given up")


def test_a_sum_squared_again_and_again_is_given_up() -> None:
    assert len(list_terms(repeat(lambda a: prod_of([a, a]), N + T + 1))) <= MOST_TERMS


@pytest.mark.parametrize("start", [3, 3 * N, N])
def test_a_product_squared_again_and_again_is_given_up(start: Amount) -> None:
    largest = repeat(lambda a: prod_of([a, a]), start)
    assert all(len(atoms) <= 16 and factor < 2**63 for atoms, factor in list_terms(largest))


def test_a_quotient_of_quotients_is_given_up() -> None:
    assert len(str(repeat(lambda a: divide_rounding(a, a + 2), N))) <= 2000


def test_a_declared_dimension_beyond_the_bounds_is_an_atom() -> None:
    for text in ("*".join(["N"] * 99), "N" * 3000 + " + 1"):
        assert parse_dim(text) == make_atom(text)
