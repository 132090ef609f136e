"""Parse and evaluate symbolic dimensions such as ``N``, ``4*N + 1`` or ``(H + -1)//(2) + 1``.

A dimension is written as a sum of products of integers and *atoms*.  An atom is a name, such as
``N``, or the quotient of two sums, rounded down, such as ``(H + -1)//(2)``.  Any other text is
treated as a single atom.  The partitioner writes these dimensions
(``partitioner/inference/dimensions.py``) into manifests and into the shapes in graphs.  The runtime
evaluates them when the sizes are known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from math import prod

Terms = tuple[tuple[tuple[str, ...], int], ...]
"""A sum of products.  Each product is a pair of its atoms and its integer factor."""

UNKNOWN = "unk__"
"""Every name that contains this text is an atom whose size is unknown."""

LESS_1 = "_less_1"
"""The end of a name for a batch of 2 or more: ``N`` is written as ``N_less_1 + 1``.

Every name stands for a size of at least 1, so this declaration refuses a batch of 1.
"""

_LONGEST = 2000
"""The largest number of characters that is parsed; a longer text is treated as one atom."""
_DEEPEST = 32
"""The deepest nesting of parentheses that is parsed; deeper text is treated as one atom."""
_NAME = re.compile(rf"{UNKNOWN}[^\s*+()]+|[\w.]+", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,15}")


@lru_cache(maxsize=1 << 14)
def parse_terms(text: str) -> Terms:
    """Parse a dimension into a sum of products of atoms (names and quotients) and integers.

    Text that cannot be parsed becomes a single atom.
    """
    terms = _parse_sum(text) if len(text) <= _LONGEST else None
    return (((text,), 1),) if terms is None else terms


def evaluate(text: str, sizes: Mapping[str, int]) -> int | None:
    """Compute the size of a dimension from the sizes of its atoms (names and quotients).

    Return ``None`` if a size is missing or a divisor is less than 1.
    """
    total = 0
    for atoms, factor in parse_terms(text):
        values = [evaluate_atom(atom, sizes) for atom in atoms]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        total += factor * prod(known)
    return total


def evaluate_atom(atom: str, sizes: Mapping[str, int]) -> int | None:
    """Return the size of an atom (a name or a quotient).

    The size is looked up in ``sizes``.  A quotient that is not in ``sizes`` is computed from the
    sizes of its parts.  Return ``None`` if a size is missing or a divisor is less than 1.
    """
    if atom in sizes:
        return sizes[atom]
    sides = _split_quotient(atom)
    if sides is None:
        return None
    left, right = (evaluate(side, sizes) for side in sides)
    if left is None or right is None or right < 1:
        return None
    return left // right


def is_name(text: str) -> bool:
    """Return whether a dimension is a name, such as ``N``, and not an expression."""
    return parse_terms(text) == (((text,), 1),) and not is_quotient(text)


def is_quotient(atom: str) -> bool:
    """Return whether an atom is a quotient, such as ``(H + -1)//(2)``."""
    return _split_quotient(atom) is not None


def describe_size(text: str) -> str:
    """Write a dimension for a reader: ``N`` in place of ``N_less_1 + 1``, ``?`` if unknown."""
    if UNKNOWN in text:
        return "?"
    if LESS_1 not in text:
        return text
    sides = _split_quotient(text)
    if sides is not None:
        return f"({describe_size(sides[0])})//({describe_size(sides[1])})"
    total: dict[tuple[str, ...], int] = {}
    for atoms, factor in parse_terms(text):
        choices = [
            ((atom.removesuffix(LESS_1), 1), ("", -1))
            if atom.endswith(LESS_1)
            else ((describe_size(atom) if is_quotient(atom) else atom, 1),)
            for atom in atoms
        ]
        for chosen in product(*choices):
            names = tuple(sorted(name for name, _ in chosen if name))
            total[names] = total.get(names, 0) + factor * prod(sign for _, sign in chosen)
    parts = [_write_product(names, factor) for names, factor in total.items() if factor]
    return " + ".join(parts) or "0"


def _write_product(names: tuple[str, ...], factor: int) -> str:
    return "*".join(names if names and factor == 1 else (str(factor), *names))


def solve_for(atom: str, text: str, size: int, sizes: Mapping[str, int]) -> int | None:
    """Compute the size of the only unknown atom (name or quotient) in a dimension of known size.

    ``atom`` is the unknown atom, ``text`` is the dimension, ``size`` is the dimension's size, and
    ``sizes`` are the sizes of the other atoms.  Return ``None`` if the dimension is not linear in
    the atom, or if no integer is a solution.
    """
    slope, offset = 0, 0
    for atoms, factor in parse_terms(text):
        count = atoms.count(atom)
        if count > 1:
            return None
        values = [evaluate_atom(other, sizes) for other in atoms if other != atom]
        rest = factor * prod(value for value in values if value is not None)
        slope, offset = slope + rest * count, offset + rest * (1 - count)
    if not slope or (size - offset) % slope:
        return None
    return (size - offset) // slope


def find_unbound(text: str, sizes: Mapping[str, int]) -> list[str]:
    """List the atoms (names and quotients) of unknown size in a dimension, without duplicates.

    An atom has a known size if it is in ``sizes`` or can be computed from them.
    """
    atoms = dict.fromkeys(atom for atoms, _ in parse_terms(text) for atom in atoms)
    return [atom for atom in atoms if evaluate_atom(atom, sizes) is None]


def _parse_sum(text: str) -> Terms | None:
    terms = []
    for part in _split(text, " + "):
        factors = [_read_factor(factor.strip(" ")) for factor in _split(part, "*")]
        if None in factors:
            return None
        atoms = sorted(factor for factor in factors if isinstance(factor, str))
        terms.append((tuple(atoms), prod(f for f in factors if isinstance(f, int))))
    return tuple(terms)


def _read_factor(text: str) -> str | int | None:
    if _NUMBER.fullmatch(text):
        return int(text)
    if _NAME.fullmatch(text) or _split_quotient(text) is not None:
        return text
    return None


@lru_cache(maxsize=1 << 14)
def _split_quotient(text: str) -> tuple[str, str] | None:
    """Split ``(left)//(right)`` if both sides are sums."""
    if not (text.startswith("(") and text.endswith(")")) or _measure_depth(text) > _DEEPEST:
        return None
    sides = list(_split(text, "//"))
    if len(sides) != 2 or not all(s.startswith("(") and s.endswith(")") for s in sides):
        return None
    left, right = (side[1:-1] for side in sides)
    return (left, right) if _parse_sum(left) and _parse_sum(right) else None


def _measure_depth(text: str) -> int:
    """Return how deeply the parentheses in a text are nested."""
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _split(text: str, sign: str) -> Iterator[str]:
    """Split a text at every ``sign`` that is outside of all parentheses."""
    depth = start = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and place >= start and text.startswith(sign, place):
            yield text[start:place]
            start = place + len(sign)
    yield text[start:]
