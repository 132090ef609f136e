"""The windows of onnx's own evaluator, pooled all at once.

``onnx.reference`` pools one window after the other in Python, which takes seconds per image. Where
this module is imported, it pools with numpy instead; ``tests/test_oracles.py`` holds the results
against those of the loops.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
from onnx.reference.ops import op_pool_common

pool_one_by_one = op_pool_common.pool
"""What the evaluator does by itself."""


def pool_at_once(
    padded: np.ndarray,
    x_shape: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    out_shape: Sequence[int],
    pooling_type: str,
    pads_required: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    count_include_pad: int = 0,
    p: int = 1,
) -> np.ndarray:
    """Pool like ``onnx.reference.ops.op_pool_common.pool``, and return the same array.

    Elements that are NaN are left out, as are those behind the image and its ``pads``.
    """
    rank = len(x_shape) - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    ends = [0 if pads is None else pads[i] + pads[i + rank] for i in range(rank)]
    required = [0 if pads_required is None else pads_required[i] for i in range(2 * rank)]
    kept = tuple(slice(0, x_shape[i + 2] + ends[i]) for i in range(rank))
    reaches = [1 + (kernel[i] - 1) * dilations[i] for i in range(rank)]
    counts = [
        int((x_shape[i + 2] + required[i] + required[i + rank] - reaches[i]) / strides[i] + 1)
        for i in range(rank)
    ]
    sizes = [max((counts[i] - 1) * strides[i] + reaches[i], 0) for i in range(rank)]
    field = np.full(
        (*x_shape[:2], *(max(*pair) for pair in zip(sizes, padded.shape[2:], strict=True))), np.nan
    )
    field[(..., *kept)] = padded[(..., *kept)] if padded.ndim else padded
    values = np.stack(
        [
            field[
                (
                    ...,
                    *(
                        slice(at * step, at * step + (count - 1) * stride + 1, stride)
                        for at, step, count, stride in zip(
                            offset, dilations, counts, strides, strict=True
                        )
                    ),
                )
            ]
            for offset in itertools.product(*map(range, kernel))
        ]
    )
    pooled = np.zeros((*x_shape[:2], *out_shape), padded.dtype)
    pooled[(..., *map(slice, counts))] = _reduce(values, pooling_type, p)
    return pooled


def _reduce(values: np.ndarray, pooling_type: str, p: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of windows of padding alone
        match pooling_type:
            case "AVG":
                return np.nanmean(values, 0)
            case "MAX":
                return np.nanmax(values, 0)
            case _:
                return np.nansum(np.abs(values) ** p, 0) ** (1 / p)


op_pool_common.pool = pool_at_once
