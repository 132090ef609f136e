"""Judge by a constant's numbers whether a network may have learned them.

Each role in which operators read constants has numbers that are usual for it: whole exponents,
masks of zeros and minus infinity, first states of zeros, regular grids, rotations.  Such numbers
were written by hand or computed by a formula.  This module knows numbers, not graphs and names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

import numpy as np

_LOOKED_AT = 1 << 16
"""The number of elements that are read."""
_MASKED = 50.0
"""Numbers that are at least this large hide a position in a mask; learned biases are small."""
_LARGE, _SMALL = 1e3, 1e-3
"""Sizes of bounds that only keep out infinities, or zeros."""
_DENOMINATORS = (10, 12, 16)
_FINER = (100,)
"""Denominators of fractions that people write; the finer ones are too dense for 16-bit floats."""


class Place(StrEnum):
    """A role in which an operator reads a constant, as a word for a sentence."""

    BOUND = "bound"
    EXPONENT = "exponent"
    GRID = "sampling grid"
    MASK = "mask"
    RANGE = "end of a range"
    ROTATION = "rotation"
    STATE = "first state"
    VALUES = "pair of values"


def is_usual(place: Place, array: np.ndarray, other: np.ndarray | None = None) -> bool:
    """Return whether numbers look fixed in the role ``place``, and not learned.

    For rotations, ``other`` holds the sines if ``array`` holds the cosines, or the reverse.
    """
    if array.size == 0:
        return True
    if place is Place.ROTATION:
        return other is not None and _is_rotation(array, other)
    return _JUDGES[place](_read(array))


def is_uniform(array: np.ndarray) -> bool:
    """Return whether all numbers are equal, as the first values of a learned tensor often are."""
    flat = array.reshape(-1)[:_LOOKED_AT]
    return bool((flat == flat[:1]).all())


def are_written(array: np.ndarray) -> bool:
    """Return whether each number is likely written in code: a simple fraction, or its reciprocal.

    Infinities and NaN are included.
    """
    wide = array.astype(np.float64)
    wide = wide[np.isfinite(wide)]
    denominators = _DENOMINATORS if array.dtype.itemsize < 4 else (*_DENOMINATORS, *_FINER)
    simple = np.zeros(wide.shape, bool)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for denominator in denominators:
            near = np.rint(wide * denominator) / denominator
            inverse = denominator / np.rint(denominator / wide)
            for guess in (near, inverse):
                simple |= guess.astype(array.dtype) == wide.astype(array.dtype)
    return bool(simple.all())


def _read(array: np.ndarray) -> np.ndarray:
    """Return the leading part of a large array, in whole rows of its first axis where possible."""
    if array.size <= _LOOKED_AT:
        return array
    row = array.size // array.shape[0]
    return array[: max(1, _LOOKED_AT // row)]


def _is_grid_of_numbers(array: np.ndarray) -> bool:
    """Return whether the numbers are whole, and not all equal."""
    return bool((array == np.rint(array)).all() and array.min() != array.max())


def _are_halves(array: np.ndarray) -> bool:
    """Return whether all numbers are whole, or whole and a half, or infinite."""
    doubled = array[np.isfinite(array)].astype(np.float64) * 2
    return bool((doubled == np.rint(doubled)).all())


def _is_usual_exponent(array: np.ndarray) -> bool:
    """Return whether exponents are whole or halves, or are one number such as 2.2 or a third."""
    return _are_halves(array) or (is_uniform(array) and are_written(array))


def _is_usual_state(array: np.ndarray) -> bool:
    """Return whether a first state is all zeros, or consists of whole numbers."""
    return not array.any() or _is_grid_of_numbers(array)


def _is_usual_mask(array: np.ndarray) -> bool:
    """Return whether a mask only hides positions, or grows with the distance of positions.

    Each matrix may have numbers of its own, like the slope of each head in ALiBi.
    """
    wide = array.astype(np.float64)
    shown = np.where(np.isfinite(wide) & (np.abs(wide) < _MASKED), wide, 0.0)
    matrices = shown.reshape(-1, *shown.shape[-2:]) if shown.ndim > 2 else shown[None]
    return all(_are_multiples(matrix) for matrix in matrices)


def _are_multiples(matrix: np.ndarray) -> bool:
    """Return whether all numbers are whole multiples of the smallest one, and one is zero."""
    sizes = np.abs(matrix[matrix != 0])
    if not sizes.size:
        return True
    times = matrix / sizes.min()
    whole = np.abs(times - np.rint(times)) <= 1e-3
    return bool(whole.all() and (matrix == 0).any())


def _is_usual_grid(array: np.ndarray) -> bool:
    """Return whether each sample's grid is an affine map of the positions, as AffineGrid makes it.

    Too few positions to tell are not enough.
    """
    if array.ndim < 3:
        return _is_grid_of_numbers(array)
    spatial = array.shape[1:-1]
    places = np.indices(spatial).reshape(len(spatial), -1).T
    columns = np.column_stack([np.ones(len(places)), places])
    if len(places) <= np.linalg.matrix_rank(columns):
        return _is_grid_of_numbers(array)
    wide = array.astype(np.float64).reshape(len(array), len(places), -1)
    for grid in wide:
        fitted = columns @ np.linalg.lstsq(columns, grid, rcond=None)[0]
        if not np.allclose(fitted, grid, atol=1e-3):
            return False
    return True


def _is_usual_bound(array: np.ndarray) -> bool:
    """Return whether a bound is whole or a half, a simple fraction of 1, very large or small."""
    sizes = np.abs(array.astype(np.float64))
    is_extreme = bool(((sizes >= _LARGE) | (sizes <= _SMALL)).all())
    is_share = bool((sizes <= 1).all()) and are_written(array)
    return _are_halves(array) or is_extreme or is_share


def _is_rotation(cosines: np.ndarray, sines: np.ndarray) -> bool:
    """Return whether the squares of each pair have the same sum, whatever the angle."""
    if cosines.shape != sines.shape:
        return False
    cosines, sines = (_read(part).astype(np.float64) for part in (cosines, sines))
    squares = cosines**2 + sines**2
    return bool(np.allclose(squares, squares.reshape(-1)[0], rtol=5e-3, atol=0))


_JUDGES: Mapping[Place, Callable[[np.ndarray], bool]] = {
    Place.BOUND: _is_usual_bound,
    Place.EXPONENT: _is_usual_exponent,
    Place.GRID: _is_usual_grid,
    Place.MASK: _is_usual_mask,
    Place.RANGE: are_written,
    Place.STATE: _is_usual_state,
    Place.VALUES: are_written,
}
