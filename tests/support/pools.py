"""The windows of onnx's own evaluator, pooled all at once.

``onnx.reference`` pools one window after the other in Python, which takes seconds per image.
``oracles`` replaces its two functions by these; ``test_pools`` compares them.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx.reference.ops import _op_common_pool, op_pool_common

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Sizes: TypeAlias = Sequence[int]

pool_one_by_one = op_pool_common.pool
find_maxima_one_by_one: Any = _op_common_pool._pool
"""The evaluator's own functions."""


def replace_pools() -> None:
    """Let the evaluator pool all windows at once."""
    op_pool_common.pool = pool_at_once
    _op_common_pool._pool = find_maxima_at_once  # type: ignore[assignment]


def pool_at_once(
    padded: Array,
    x_shape: Sizes,
    kernel: Sizes,
    strides: Sizes | None,
    out_shape: Sizes,
    pooling_type: str,
    pads_required: Sizes | None = None,
    pads: Sizes | None = None,
    dilations: Sizes | None = None,
    count_include_pad: int = 0,
    p: int = 1,
) -> Array:
    """Pool like ``pool_one_by_one``, and return the same array.

    Elements that are NaN are left out, and so are those behind the image and its ``pads``.
    """
    del count_include_pad  # what is not counted is NaN already
    rank = len(x_shape) - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    pads, required = pads or [0] * 2 * rank, pads_required or [0] * 2 * rank
    reaches = [1 + (kernel[i] - 1) * dilations[i] for i in range(rank)]
    counts = [
        int((x_shape[i + 2] + required[i] + required[i + rank] - reaches[i]) / strides[i] + 1)
        for i in range(rank)
    ]
    image = [slice(x_shape[i + 2] + pads[i] + pads[i + rank]) for i in range(rank)]
    windows = _stack_windows(padded[:, :, *image], counts, kernel, strides, dilations)
    return _place(_reduce(windows, pooling_type, p), counts, (*x_shape[:2], *out_shape), padded)


def find_maxima_at_once(
    padded: Array,
    x_shape: Sizes,
    kernel: Sizes,
    strides: Sizes,
    out_shape: Sizes,
    pad_shape: Sizes,
    pooling_type: str,
    count_include_pad: int | None = 0,
    ceil_mode: int | None = 0,
    indices: bool = False,
    pads: Array | None = None,
) -> Array:
    """Find maxima like ``find_maxima_one_by_one``, which is asked if the indices are wanted."""
    if indices or pooling_type != "MAX":
        answer: Array = find_maxima_one_by_one(
            padded, x_shape, kernel, strides, out_shape, pad_shape, pooling_type,
            count_include_pad, ceil_mode, indices, pads,
        )  # fmt: skip
        return answer
    rank = len(x_shape) - 2
    rounded = math.ceil if ceil_mode else math.floor
    counts = [
        rounded((x_shape[i + 2] + pad_shape[i] - kernel[i]) / strides[i] + 1) for i in range(rank)
    ]
    windows = _stack_windows(padded, counts, kernel, strides, [1] * rank)
    return _place(_reduce(windows, "MAX", 1), counts, (*x_shape[:2], *out_shape), padded)


def _stack_windows(
    image: Array, counts: Sizes, kernel: Sizes, strides: Sizes, dilations: Sizes
) -> Array:
    """Return the elements of all windows: one array of all windows for each place in a window.

    What a window has beyond the image is NaN.
    """
    axes = list(zip(counts, kernel, strides, dilations, strict=True))
    ends = [(count - 1) * stride + (size - 1) * step + 1 for count, size, stride, step in axes]
    missing = [(0, max(end - length, 0)) for end, length in zip(ends, image.shape[2:], strict=True)]
    field = np.pad(image, [(0, 0), (0, 0), *missing], constant_values=np.nan)
    stacked = []
    for place in itertools.product(*map(range, kernel)):
        firsts = [at * step for at, (*_, step) in zip(place, axes, strict=True)]
        taken = tuple(
            slice(first, first + (count - 1) * stride + 1, stride)
            for first, (count, _, stride, _) in zip(firsts, axes, strict=True)
        )
        stacked.append(field[:, :, *taken])
    return np.stack(stacked)


def _reduce(windows: Array, pooling_type: str, p: int) -> Array:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of windows of padding alone
        if pooling_type == "AVG":
            return np.asarray(np.nanmean(windows, 0))
        if pooling_type == "MAX":
            return np.asarray(np.nanmax(windows, 0))
        return np.asarray(np.nansum(np.abs(windows) ** p, 0) ** (1 / p))


def _place(pooled: Array, counts: Sizes, shape: Sizes, like: Array) -> Array:
    result = np.zeros(shape, like.dtype)
    result[:, :, *map(slice, counts)] = pooled
    return result
