"""Calculate with unknown dimensions, such as ``4*N + 1`` for an unknown batch size ``N``.

An unknown size such as ``N`` is called an *atom*; it has the same value everywhere in one run of a
model, and is at least 0.  A dimension is a sum of products of atoms and integers.  An *amount* is a
number or such a dimension.  A comparison returns a result only if the result is the same for all
values of the atoms.  Products of sums grow exponentially.  The number of terms, the number of
factors and the length of the amount as text are therefore limited, and an amount that exceeds these
limits raises :class:`TooLarge`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from splitonnx.expressions import UNKNOWN, parse_terms

MOST_TERMS = 32
"""Limit of terms in one sum."""
MOST_FACTORS = 16
"""Limit of atoms in one product."""
MOST_CHARACTERS = 2000
"""Limit of characters in the text of an amount; the text may become an atom's name."""
_MOST_PAIRS = 256
"""Limit of terms that one multiplication creates before equal terms are added up."""
_LARGEST, _LARGEST_FACTOR = 2**63, 10**15


class Undecided(Exception):
    """Raised if the result of an operation depends on sizes that are not known."""


class TooLarge(Undecided):
    """Raised if an amount exceeds this module's limits."""


@dataclass(frozen=True)
class Dim:
    """A dimension that is not known: a sum of products of atoms and integers.

    Each term is a pair of its sorted atoms (unknown sizes) and its integer factor, such as
    ``(("N",), 4)`` for ``4*N``.  At least one term has an atom.
    """

    terms: tuple[tuple[tuple[str, ...], int], ...]

    def __str__(self) -> str:
        return " + ".join(_write_term(atoms, factor) for atoms, factor in self.terms)

    @property
    def atoms(self) -> frozenset[str]:
        """The atoms (unknown sizes) in this sum."""
        return frozenset(atom for atoms, _ in self.terms for atom in atoms)

    def __add__(self, other: Amount) -> Amount:
        return _collect([*self.terms, *list_terms(other)])

    def __mul__(self, other: Amount) -> Amount:
        others = list_terms(other)
        if len(self.terms) * len(others) > _MOST_PAIRS:
            raise TooLarge
        return _collect(
            [
                (tuple(sorted((*left, *right))), factor * scale)
                for left, factor in self.terms
                for right, scale in others
            ]
        )

    def __sub__(self, other: Amount) -> Amount:
        return self + -other

    def __rsub__(self, other: int) -> Amount:
        return -self + other

    def __neg__(self) -> Amount:
        return self * -1

    __radd__ = __add__
    __rmul__ = __mul__


Amount = int | Dim
"""A size: a number, or a dimension with unknown sizes."""


Place = TypeVar("Place")


def make_atom(name: str) -> Dim:
    """Return a dimension that is a single unknown size (an atom)."""
    return Dim((((name,), 1),))


def parse_dim(text: str) -> Dim | int:
    """Parse a dimension's text as exporters write it, such as ``N``, ``2*s77`` or ``s0 + 1``.

    If the text is not a sum of products, or exceeds the limits, the complete text becomes the name
    of an unknown size.
    """
    try:
        return _collect(list(parse_terms(text)))
    except TooLarge:
        return make_atom(text)


def add(left: Amount, right: Amount) -> Amount:
    """Add two amounts (numbers or dimensions).

    Raises:
        TooLarge: the sum exceeds the limits.
    """
    return bound(left + right)


def multiply(left: Amount, right: Amount) -> Amount:
    """Multiply two amounts (numbers or dimensions).

    Raises:
        TooLarge: the product exceeds the limits.
    """
    return bound(left * right)


def bound(amount: Amount) -> Amount:
    """Return ``amount`` unchanged; if it is a number, first check that it fits in 64 bits.

    Raises:
        TooLarge: ``amount`` is a number that does not fit in 64 bits.
    """
    if not isinstance(amount, Dim) and not -_LARGEST <= amount < _LARGEST:
        raise TooLarge
    return amount


def sum_of(amounts: Iterable[Amount]) -> Amount:
    """Return the sum of ``amounts``.

    Raises:
        TooLarge: the sum, or an intermediate sum, exceeds the limits.
    """
    total: Amount = 0
    for amount in amounts:
        total = add(total, amount)
    return total


def prod_of(amounts: Iterable[Amount]) -> Amount:
    """Return the product of ``amounts``.

    Raises:
        TooLarge: the product, or an intermediate product, exceeds the limits.
    """
    result: Amount = 1
    for amount in amounts:
        result = multiply(result, amount)
    return result


def is_positive(amount: Amount) -> bool:
    """Return whether an amount is certainly at least 1, for all values of its unknown sizes."""
    return is_natural(amount) and sum(f for atoms, f in list_terms(amount) if not atoms) > 0


def is_natural(amount: Amount) -> bool:
    """Return whether an amount is certainly at least 0, for all values of its unknown sizes."""
    return all(factor >= 0 for _, factor in list_terms(amount))


def is_equal(left: Amount, right: Amount) -> bool:
    """Return whether two amounts are equal.

    Raises:
        Undecided: the answer depends on sizes that are not known.
    """
    difference = left - right
    if not isinstance(difference, Dim):
        return bool(difference == 0)
    if is_positive(difference) or is_positive(-difference):
        return False
    raise Undecided


def is_less(left: Amount, right: Amount) -> bool:
    """Return whether ``left`` is less than ``right``.

    Raises:
        Undecided: the answer depends on sizes that are not known.
    """
    if is_positive(right - left):
        return True
    if is_natural(left - right):
        return False
    raise Undecided


def divide_exactly(amount: Amount, divisor: Amount) -> Amount:
    """Divide ``amount`` by ``divisor``, which must leave no remainder.

    Raises:
        Undecided: there may be a remainder for some sizes.
    """
    parts = list_terms(divisor)
    if len(parts) != 1 or parts[0][1] == 0:
        raise Undecided
    (atoms, factor), quotients = parts[0], []
    for own, scale in list_terms(amount):
        rest = list(own)
        for atom in atoms:
            if atom not in rest:
                raise Undecided
            rest.remove(atom)
        if scale % factor:
            raise Undecided
        quotients.append((tuple(rest), scale // factor))
    return _collect(quotients)


def divide_rounding(amount: Amount, divisor: Amount) -> Amount:
    """Divide two amounts and round towards zero, as ONNX does when it divides integers.

    If there may be a remainder, the quotient is a new unknown size with a name such as
    ``(N)//(2)``.

    Raises:
        Undecided: the divisor may be 0, or one of the amounts may be negative.
        TooLarge: the name of the new unknown size would exceed the limit.
    """
    if not isinstance(amount, Dim) and not isinstance(divisor, Dim):
        if divisor == 0:
            raise Undecided
        quotient = abs(amount) // abs(divisor)
        return quotient if (amount < 0) == (divisor < 0) else -quotient
    try:
        return divide_exactly(amount, divisor)
    except Undecided:
        return _compose("//", amount, divisor)


def take_remainder(amount: Amount, divisor: Amount) -> Amount:
    """Return the remainder of dividing ``amount`` by ``divisor``; both must be at least 0.

    Raises:
        Undecided: the remainder depends on sizes that are not known.
    """
    if not isinstance(amount, Dim) and not isinstance(divisor, Dim) and divisor:
        return amount % divisor
    divide_exactly(amount, divisor)
    return 0


def _compose(sign: str, left: Amount, right: Amount) -> Dim:
    if not (is_natural(left) and is_positive(right)):
        raise Undecided  # an atom is at least 0
    text = f"({left}){sign}({right})"
    if len(text) > MOST_CHARACTERS:
        raise TooLarge
    return make_atom(text)


def solve(wanted: Amount, known: Mapping[Place, Amount]) -> dict[str, tuple[Place, int, int]]:
    """Find out how to compute each unknown size in ``wanted`` from a dimension in ``known``.

    Return a tuple (key, factor, offset) for each unknown size.  The tuple means that the dimension
    ``known[key]`` equals ``factor * size + offset``.

    Raises:
        Undecided: a size cannot be computed from any dimension; the message is the size's name.
    """
    atoms = wanted.atoms if isinstance(wanted, Dim) else frozenset[str]()
    return {atom: _solve_atom(atom, known) for atom in sorted(atoms)}


def _solve_atom(atom: str, known: Mapping[Place, Amount]) -> tuple[Place, int, int]:
    found = []
    for key, amount in known.items():
        terms = dict(list_terms(amount))
        offset = terms.pop((), 0)
        if set(terms) == {(atom,)}:
            found.append((key, terms[(atom,)], offset))
    if not found:
        raise Undecided(atom)
    return min(found, key=lambda way: (way[1] != 1, way[2] != 0))


def name_unknown(value: str, axis: int) -> Dim:
    """Return a symbol for the unknown size of one axis of a value.

    The symbol contains the name of the value and the number of the axis.
    """
    plain = re.sub(r"[\s*+()%]", lambda found: f"%{ord(found[0]):x}", value)
    return make_atom(f"{UNKNOWN}{plain}:{axis}")


def is_unknown(amount: Amount) -> bool:
    """Return whether an amount contains an unknown size that :func:`name_unknown` created."""
    return isinstance(amount, Dim) and any(UNKNOWN in atom for atom in amount.atoms)


def list_terms(amount: Amount) -> list[tuple[tuple[str, ...], int]]:
    """List the terms of a symbolic size, each as its unknown sizes and their integer coefficient.

    A term is the product of its unknown sizes and its coefficient.
    """
    return list(amount.terms) if isinstance(amount, Dim) else [((), int(amount))]


def _collect(terms: list[tuple[tuple[str, ...], int]]) -> Amount:
    sums: dict[tuple[str, ...], int] = {}
    for atoms, factor in terms:
        sums[atoms] = sums.get(atoms, 0) + factor
    kept = tuple(sorted(((a, f) for a, f in sums.items() if f), key=lambda t: (not t[0], t[0])))
    if not any(atoms for atoms, _ in kept):
        return bound(sum(factor for _, factor in kept))
    if len(kept) > MOST_TERMS or any(
        len(atoms) > MOST_FACTORS or abs(factor) >= _LARGEST_FACTOR for atoms, factor in kept
    ):
        raise TooLarge
    dim = Dim(kept)
    if sum(len(atom) + 1 for atoms, _ in kept for atom in atoms) > MOST_CHARACTERS:
        raise TooLarge
    return dim


def _write_term(atoms: tuple[str, ...], factor: int) -> str:
    if not atoms:
        return str(factor)
    names = "*".join(atoms)
    return names if factor == 1 else f"{factor}*{names}"
