"""Implement Conv for onnx's reference evaluator.

onnx's own class gathers the windows by an index of 64 bits for each number, which takes three
quarters of its time: a ResNet-18 then takes longer than the evaluator may.  The formula is that of
Conv-22 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from onnx.reference.op_run import OpRun


class Conv(OpRun):
    """Compute Conv: the products of a kernel with each window of an image, summed, and a bias."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray | None = None,
        auto_pad: str | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[np.ndarray]:
        rank, groups = x.ndim - 2, group or 1
        kernel = weight.shape[2:]
        if rank < 1 or tuple(kernel_shape or kernel) != kernel or len(kernel) != rank:
            raise ValueError(f"a kernel of sizes {kernel} for an image of shape {x.shape}")
        if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
            raise ValueError(f"weights of shape {weight.shape} for {x.shape} in {groups} groups")
        steps, gaps = strides or [1] * rank, dilations or [1] * rank
        reach = [(size - 1) * gap + 1 for size, gap in zip(kernel, gaps, strict=True)]
        padding = _list_padding(x.shape[2:], reach, steps, auto_pad, pads or [0] * 2 * rank)
        padded = np.pad(x, [(0, 0), (0, 0), *padding])
        axes = tuple(range(2, 2 + rank))
        windows = sliding_window_view(padded, reach, axes)  # (N, C, *all places, *reach)
        chosen = [slice(None, None, step) for step in (*steps, *gaps)]
        windows = windows[(slice(None), slice(None), *chosen)]  # (N, C, *places, *kernel)
        places = windows.shape[2 : 2 + rank]
        moved = np.moveaxis(windows, range(-rank, 0), axes)  # (N, C, *kernel, *places)
        columns = moved.reshape(len(x), groups, weight[0].size, int(np.prod(places)))
        made = weight.reshape(groups, len(weight) // groups, -1) @ columns  # (N, G, M/G, places)
        made = made.reshape(len(x), len(weight), *places)
        if bias is not None:
            made = made + bias.reshape(-1, *(1,) * rank)
        return (made.astype(x.dtype),)


def _list_padding(
    sizes: Sequence[int],
    reach: Sequence[int],
    steps: Sequence[int],
    auto_pad: str | None,
    pads: Sequence[int],
) -> list[tuple[int, int]]:
    """List the padding before and after each axis of an image."""
    if auto_pad == "VALID":
        return [(0, 0)] * len(sizes)
    if auto_pad not in ("SAME_LOWER", "SAME_UPPER"):
        return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))
    padding = []
    for size, width, step in zip(sizes, reach, steps, strict=True):
        total = max(0, (-(-size // step) - 1) * step + width - size)
        less, more = total // 2, total - total // 2
        padding.append((less, more) if auto_pad == "SAME_UPPER" else (more, less))
    return padding
