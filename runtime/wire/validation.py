"""What no training survives is refused before the step: NaN, infinity, gradients out of bounds.

It knows arrays and numbers; which tensors are guarded is the protocol's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from splitonnx.errors import NormTooLarge, NotFinite

_CHUNK = 1 << 18
"""Elements that are looked at together: no check takes memory in proportion to a message."""


def check_values(name: str, array: np.ndarray, where: str, limit: float | None = None) -> None:
    """Raise where a floating-point array holds NaN or infinity, or its L2 norm is over ``limit``.

    Raises:
        NotFinite: it names the array and ``where``.
        NormTooLarge: it names the norm and the limit.
    """
    if array.dtype.kind != "f" or not array.size:
        return
    if not all(np.isfinite(chunk).all() for chunk in _split(array)):
        raise NotFinite(name, where)
    if limit is not None and (norm := math.sqrt(_sum_squares(array))) > limit:
        raise NormTooLarge(name, norm, limit)


def _split(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    return (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))


def _sum_squares(array: np.ndarray) -> float:
    """Sum the squares with room for large values; infinite beyond that of float64."""
    with np.errstate(over="ignore"):
        return sum(float(np.square(c, dtype=np.float64).sum()) for c in _split(array))
