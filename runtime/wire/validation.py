"""Checks that received tensors are finite, and that the norms of gradients are not too large.

Tensors are checked before a step uses them.  This module checks the values of arrays; the protocol
decides which tensors are checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from splitonnx.errors import NormTooLarge, NotFinite

_CHUNK = 1 << 18
"""Elements that are checked at a time, so that large messages do not need more memory."""


def check_finite(name: str, array: np.ndarray, where: str) -> None:
    """Check that a floating-point array contains neither NaN nor infinity.

    ``name`` is the array's name, and ``where`` describes its origin, such as ``step 3``.

    Raises:
        NotFinite: the array contains NaN or infinity; the error contains ``name`` and ``where``.
    """
    if array.dtype.kind == "f" and not all(np.isfinite(chunk).all() for chunk in _split(array)):
        raise NotFinite(name, where)


def check_norm(name: str, array: np.ndarray, limit: float) -> None:
    """Check that the L2 norm of a floating-point array is at most ``limit``.

    Raises:
        NormTooLarge: the norm is larger; the error contains the array's name, the norm and the
            limit.
    """
    if array.dtype.kind == "f" and (norm := math.sqrt(_sum_squares(array))) > limit:
        raise NormTooLarge(name, norm, limit)


def _split(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    return (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))


def _sum_squares(array: np.ndarray) -> float:
    """Sum the squares in float64, so that large values fit; return infinity if they do not."""
    with np.errstate(over="ignore"):
        return sum(float(np.square(c, dtype=np.float64).sum()) for c in _split(array))
