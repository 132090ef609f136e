"""Measure how far results are from what is expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from splitonnx.partitioner.cutting.conformance.samples import Arrays


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of one tensor, relative to the largest value that is expected of it.

    ``size`` is infinite if shapes differ, or if only one of the two is not finite.  ``batch`` is
    the number of the batch, counted from 0.
    """

    tensor: str
    batch: int
    size: float


def find_largest(expected: Sequence[Arrays], found: Sequence[Arrays]) -> Difference:
    """Return the largest difference among the tensors that both have, over all batches."""
    differences = [
        Difference(tensor=name, batch=number, size=measure(have[name], array))
        for number, (want, have) in enumerate(zip(expected, found, strict=True))
        for name, array in want.items()
        if name in have
    ]
    none = Difference(tensor="", batch=0, size=0.0)
    return max([none, *differences], key=lambda difference: difference.size)


def measure(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference relative to the largest expected value; NaN equals NaN."""
    if found.shape != expected.shape:
        return np.inf
    if expected.dtype.kind in "OSU":
        return 0.0 if np.array_equal(found, expected) else np.inf
    first, second = _widen(found), _widen(expected)
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore"):  # of infinities
        gap = np.abs(np.where(same, 0, first - second)).max()
    largest = np.abs(second[np.isfinite(second)]).max(initial=0)
    size = float(gap / max(largest, 1e-30))
    return size if np.isfinite(size) else np.inf


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
