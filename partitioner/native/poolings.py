"""Implement poolings for onnx's reference evaluator.

onnx's own classes pad as if there were no dilations where ``auto_pad`` is SAME_LOWER or SAME_UPPER,
and leave elements out of averages with dilations.  Their loops in Python also take long.  The
formulas are those of AveragePool-22, LpPool-22 and MaxPool-22 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_max_pool


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """The windows along an axis of ``size`` elements.

    Window ``i`` reads the elements ``i * stride + j * dilation - before`` for ``j`` below
    ``kernel``, of which those outside of the axis are padding.  ``count`` is the number of windows.
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    count: int

    def locate(self, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what the windows read at one place of the kernel.

        These are the elements, whether each is one of the axis, and whether each is an element or
        padding that counts, which is no further than ``after`` behind the axis.
        """
        found = np.arange(self.count) * self.stride + place * self.dilation - self.before
        is_element = (found >= 0) & (found < self.size)
        return np.clip(found, 0, self.size - 1), is_element, found < self.size + self.after


def _read_axes(
    x: np.ndarray,
    kernel: Sequence[int],
    auto_pad: str | None,
    ceil_mode: int | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
) -> list[_Axis]:
    rank = len(kernel)
    steps = zip(kernel, strides or [1] * rank, dilations or [1] * rank, strict=True)
    given = list(pads or [0] * 2 * rank)
    axes = []
    for index, (width, stride, dilation) in enumerate(steps):
        size, reach = x.shape[2 + index], (width - 1) * dilation + 1
        before, after = (given[index], given[rank + index]) if _is_explicit(auto_pad) else (0, 0)
        if auto_pad in ("SAME_LOWER", "SAME_UPPER"):
            count = -(-size // stride)
            total = max(0, (count - 1) * stride + reach - size)
            before = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
            after = total - before
        else:
            room = size + before + after - reach
            count = (-(-room // stride) if ceil_mode else room // stride) + 1
            if ceil_mode and (count - 1) * stride >= size + before:
                count -= 1  # a window that starts in the padding behind
        axes.append(
            _Axis(
                size=size,
                kernel=width,
                stride=stride,
                dilation=dilation,
                before=before,
                after=after,
                count=count,
            )
        )
    return axes


def _is_explicit(auto_pad: str | None) -> bool:
    return auto_pad in (None, "", "NOTSET")


def _iter_places(
    x: np.ndarray, axes: Sequence[_Axis]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield what all windows read at each place of the kernel, as :meth:`_Axis.locate` does."""
    for places in product(*(range(axis.kernel) for axis in axes)):
        found = [axis.locate(place) for axis, place in zip(axes, places, strict=True)]
        indices, elements, counted = zip(*found, strict=True)
        values = x
        for number, index in enumerate(indices, 2):
            values = values.take(index, number)
        yield values, _combine(elements), _combine(counted)


def _combine(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Return for each window whether all of its axes' masks are true."""
    combined: np.ndarray = np.all(np.meshgrid(*masks, indexing="ij"), axis=0)
    return combined


class AveragePool(OpRun):
    """Compute AveragePool: the mean of the elements of each window, and of padding if included."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        count_include_pad: int | None = None,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] = (),
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[np.ndarray]:
        axes = _read_axes(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
        total: Any = 0.0
        number: Any = 0
        for values, is_element, is_counted in _iter_places(x, axes):
            total = total + np.where(is_element, values.astype(np.float64), 0.0)
            number = number + (is_counted if count_include_pad else is_element)
        return ((total / number).astype(x.dtype),)


class LpPool(OpRun):
    """Compute LpPool: the p-norm of the elements of each window."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] = (),
        p: int = 2,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[np.ndarray]:
        axes = _read_axes(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
        total: Any = 0.0
        for values, is_element, _ in _iter_places(x, axes):
            total = total + np.where(is_element, np.abs(values.astype(np.float64)) ** p, 0.0)
        return ((total ** (1 / p)).astype(x.dtype),)


class MaxPool(OpRun):
    """Compute MaxPool: the largest element of each window; onnx's own class finds its place."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] = (),
        pads: Sequence[int] | None = None,
        storage_order: int | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, ...]:
        axes = _read_axes(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
        if len(self.onnx_node.output) > 1:
            own: Any = op_max_pool.MaxPool(self.onnx_node, self.run_params)
            made: tuple[np.ndarray, ...] = own._run(
                x,
                auto_pad="NOTSET",
                ceil_mode=ceil_mode,
                dilations=dilations,
                kernel_shape=kernel_shape,
                pads=[axis.before for axis in axes] + [axis.after for axis in axes],
                storage_order=storage_order,
                strides=strides,
            )
            return made
        least = np.iinfo(x.dtype).min if x.dtype.kind in "iu" else -np.inf
        largest: Any = None
        for values, is_element, _ in _iter_places(x, axes):
            found = np.where(is_element, values, np.array(least, x.dtype))
            largest = found if largest is None else np.maximum(largest, found)
        return (largest,)


POOLINGS: tuple[type[OpRun], ...] = (AveragePool, LpPool, MaxPool)
"""The classes that the evaluator uses instead of its own."""
