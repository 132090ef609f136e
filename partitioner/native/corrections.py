"""Operators that onnx's reference evaluator computes differently from the ONNX standard.

Each is written here as the standard describes it, in numpy.  The evaluator uses them instead of its
own, in every opset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_conv_transpose

_FLAT_UNTIL = 12
"""The last opset in which Softmax and its relatives flatten their input to a matrix."""


class BatchNormalization(OpRun):
    """BatchNormalization; up to opset 13 the evaluator uses the batch's statistics in inference."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        scale: np.ndarray,
        bias: np.ndarray,
        mean: np.ndarray,
        var: np.ndarray,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        training_mode: int = 0,
    ) -> tuple[np.ndarray, ...]:
        used = (mean, var)
        updated: tuple[np.ndarray, ...] = ()
        if training_mode:
            axes = (0, *range(2, x.ndim))
            used = (x.mean(axes), x.var(axes))
            pairs = zip((mean, var), used, strict=True)
            updated = tuple(old * momentum + new * (1 - momentum) for old, new in pairs)
        each = (-1, *(1,) * (x.ndim - 2))
        centred = (x - used[0].reshape(each)) / np.sqrt(used[1].reshape(each) + epsilon)
        normal = centred * scale.reshape(each) + bias.reshape(each)
        return tuple(array.astype(x.dtype) for array in (normal, *updated))


class LRN(OpRun):
    """LRN; the evaluator leaves out channels if there are more of them than samples."""

    op_domain = ""

    def _run(
        self, x: np.ndarray, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0,
        size: int = 1,
    ) -> tuple[np.ndarray]:  # fmt: skip
        before, after = (size - 1) // 2, size // 2
        channels = x.shape[1]
        spans = [(max(0, c - before), c + after + 1) for c in range(channels)]
        sums = [(x[:, start:end] ** 2).sum(1, keepdims=True) for start, end in spans]
        scale = bias + alpha / size * np.concatenate(sums, 1)
        return ((x / scale**beta).astype(x.dtype),)


class LpNormalization(OpRun):
    """LpNormalization; the evaluator takes no absolute values, which matters for p = 1."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int = -1, p: int = 2) -> tuple[np.ndarray]:
        size = (np.abs(x) ** p).sum(axis, keepdims=True) ** (1 / p)
        normal = np.divide(x, size, out=np.zeros_like(x), where=size != 0)
        return (normal.astype(x.dtype),)


class ConvTranspose(OpRun):
    """ConvTranspose; the evaluator mixes up the weights and biases of several groups."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        w: np.ndarray,
        b: np.ndarray | None = None,
        auto_pad: str | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        kernel_shape: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[np.ndarray]:
        count = group or 1
        biases = [None] * count if b is None else np.split(b, count)
        parts = zip(np.split(x, count, 1), np.split(w, count), biases, strict=True)
        own: Any = op_conv_transpose.ConvTranspose
        made = [
            own._run(
                self,
                *part,
                auto_pad=auto_pad,
                dilations=dilations,
                group=1,
                kernel_shape=kernel_shape,
                output_padding=output_padding,
                output_shape=output_shape,
                pads=pads,
                strides=strides,
            )[0]
            for part in parts
        ]
        return (np.concatenate(made, 1).astype(x.dtype),)


class Softmax(OpRun):
    """Softmax; the evaluator knows it along one axis only, as it is from opset 13 on."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
        axes = _find_axes(self, x.ndim)
        powers = np.exp(x - x.max(axes, keepdims=True))
        return ((powers / powers.sum(axes, keepdims=True)).astype(x.dtype),)


class LogSoftmax(OpRun):
    """LogSoftmax; see :class:`Softmax`."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
        axes = _find_axes(self, x.ndim)
        gap = x - x.max(axes, keepdims=True)
        return ((gap - np.log(np.exp(gap).sum(axes, keepdims=True))).astype(x.dtype),)


class Hardmax(OpRun):
    """Hardmax; see :class:`Softmax`."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
        axes = _find_axes(self, x.ndim)
        moved = np.moveaxis(x, axes, range(-len(axes), 0))
        rows = moved.reshape(*moved.shape[: -len(axes)], -1)
        hot = np.arange(rows.shape[-1]) == rows.argmax(-1)[..., None]
        made = np.moveaxis(hot.reshape(moved.shape), range(-len(axes), 0), axes)
        return (made.astype(x.dtype),)


def _find_axes(op: OpRun, rank: int) -> tuple[int, ...]:
    """Return the axes over which Softmax or a relative works; in old opsets, all from one on."""
    is_old = op.run_params["opsets"][""] <= _FLAT_UNTIL
    given = [a.i for a in op.onnx_node.attribute if a.name == "axis"]
    axis = given[0] if given else 1 if is_old else -1
    return tuple(range(axis % rank, rank)) if is_old else (axis % rank,)


CORRECTIONS: tuple[type[OpRun], ...] = (
    BatchNormalization,
    ConvTranspose,
    LRN,
    LpNormalization,
    Softmax,
    LogSoftmax,
    Hardmax,
)
"""The operators written here."""
