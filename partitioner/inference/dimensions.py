"""Represent dimensions as symbols: sums of products of unknown sizes, compared if provable.

An unknown size is an *atom*, such as the batch ``N``; ``4*N + 1`` can be used in arithmetic like
a number.  Two dimensions are equal exactly if their sums are: the same atom is the same size
within one run of a model.  An atom is at least 0.  The number of terms and factors and the length
of the text are limited, since products of sums grow exponentially; a larger amount raises
:class:`TooLarge`.  This module does not depend on graphs or operators.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from splitonnx.expressions import UNKNOWN, parse_terms

MOST_TERMS = 32
"""Limit of products in one sum."""
MOST_FACTORS = 16
"""Limit of atoms in one product."""
MOST_CHARACTERS = 2000
"""Limit of characters in an amount's text, which may become the name of an atom when read back."""
_MOST_PAIRS = 256
"""Limit of products of terms in one multiplication."""
_LARGEST, _LARGEST_FACTOR = 2**63, 10**15


class Undecided(Exception):
    """Raised if a comparison or division holds for some sizes and not for others."""


class TooLarge(Undecided):
    """Raised if an amount exceeds this module's limits; nothing is known of it."""


@dataclass(frozen=True)
class Dim:
    """A sum of products: ``terms`` pairs sorted atoms with a factor; at least one has an atom."""

    terms: tuple[tuple[tuple[str, ...], int], ...]

    def __str__(self) -> str:
        return " + ".join(_write_term(atoms, factor) for atoms, factor in self.terms)

    @property
    def atoms(self) -> frozenset[str]:
        """The atoms in this sum."""
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
"""A known number or a symbolic dimension."""


Place = TypeVar("Place")


def make_atom(name: str) -> Dim:
    """Return a dimension that is a single unknown size."""
    return Dim((((name,), 1),))


def parse_dim(text: str) -> Dim | int:
    """Parse a symbolic dimension as exporters write it: ``N``, ``2*s77``, ``s0 + 1``.

    Text that is not such a sum of products, or exceeds the limits, becomes the name of a single
    atom.
    """
    try:
        return _collect(list(parse_terms(text)))
    except TooLarge:
        return make_atom(text)


def add(left: Amount, right: Amount) -> Amount:
    """Add two amounts.

    Raises:
        TooLarge: the sum exceeds the limits.
    """
    return bound(left + right)


def multiply(left: Amount, right: Amount) -> Amount:
    """Multiply two amounts.

    Raises:
        TooLarge: the product exceeds the limits.
    """
    return bound(left * right)


def bound(amount: Amount) -> Amount:
    """Return an amount unchanged, after checking that it fits in 64 bits if it is a number.

    Raises:
        TooLarge: it is a number that takes more than 64 bits.
    """
    if not isinstance(amount, Dim) and not -_LARGEST <= amount < _LARGEST:
        raise TooLarge
    return amount


def sum_of(amounts: Iterable[Amount]) -> Amount:
    """Return the sum of all amounts.

    Raises:
        TooLarge: a sum exceeds the limits.
    """
    total: Amount = 0
    for amount in amounts:
        total = add(total, amount)
    return total


def prod_of(amounts: Iterable[Amount]) -> Amount:
    """Return the product of all amounts.

    Raises:
        TooLarge: a product exceeds the limits.
    """
    result: Amount = 1
    for amount in amounts:
        result = multiply(result, amount)
    return result


def is_positive(amount: Amount) -> bool:
    """Return whether an amount is at least 1 for all values of its atoms."""
    return is_natural(amount) and sum(f for atoms, f in list_terms(amount) if not atoms) > 0


def is_natural(amount: Amount) -> bool:
    """Return whether an amount is at least 0 for all values of its atoms."""
    return all(factor >= 0 for _, factor in list_terms(amount))


def is_equal(left: Amount, right: Amount) -> bool:
    """Return whether two amounts are equal.

    Raises:
        Undecided: they are equal for some sizes only.
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
        Undecided: it depends on the sizes.
    """
    if is_positive(right - left):
        return True
    if is_natural(left - right):
        return False
    raise Undecided


def divide_exactly(amount: Amount, divisor: Amount) -> Amount:
    """Divide amounts if there is no remainder for any sizes.

    Raises:
        Undecided: there may be a remainder.
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
    """Divide like ONNX divides integers; an inexact quotient becomes an atom of its own."""
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
    """Return the remainder of a division of amounts that are at least 0.

    Raises:
        Undecided: it depends on the sizes.
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
    """Find how to compute every atom of ``wanted`` from one of the ``known`` dimensions.

    Return for each atom (key of the known dimension, factor, offset), such that the dimension is
    ``factor * atom + offset``.

    Raises:
        Undecided: no known dimension yields an atom; the message is the atom's name.
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
    """Return a new atom for a dimension that is not known at all."""
    plain = re.sub(r"[\s*+()%]", lambda found: f"%{ord(found[0]):x}", value)
    return make_atom(f"{UNKNOWN}{plain}:{axis}")


def is_unknown(amount: Amount) -> bool:
    """Return whether an amount contains an atom of an unknown dimension."""
    return isinstance(amount, Dim) and any(UNKNOWN in atom for atom in amount.atoms)


def list_terms(amount: Amount) -> list[tuple[tuple[str, ...], int]]:
    """List an amount's products as (atoms, factor)."""
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
