"""What no training survives is refused before the step: NaN, infinity, gradients out of bounds.

It knows arrays and numbers; which tensors are guarded is the protocol's business.
"""

from __future__ import annotations

import math

import numpy as np

from splitonnx.errors import NormTooLarge, NotFinite


def check_values(name: str, array: np.ndarray, where: str, limit: float | None = None) -> None:
    """Raise where a floating-point array holds NaN or infinity, or its L2 norm is over ``limit``.

    Raises:
        NotFinite: it names the array and ``where``.
        NormTooLarge: it names the norm and the limit.
    """
    if array.dtype.kind != "f" or not array.size:
        return
    flat = array.reshape(-1)
    # One pass: a sum of squares is finite only if all its terms are.  It can overflow as well,
    # which the second look, that costs more, tells apart.
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.dot(flat, flat))
    if not math.isfinite(square):
        if not np.isfinite(flat).all():
            raise NotFinite(name, where)
        square = _sum_squares(flat)
    if limit is not None and math.sqrt(square) > limit:
        raise NormTooLarge(name, math.sqrt(square), limit)


def _sum_squares(flat: np.ndarray) -> float:
    """Sum the squares with room for large values; infinite beyond that of float64."""
    with np.errstate(over="ignore"):
        return float(np.sum(np.square(flat, dtype=np.float64)))
