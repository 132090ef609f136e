"""Implement operators that onnx's reference evaluator lacks, computes incorrectly or slowly.

Each class computes an operator with numpy as the ONNX standard describes it.  The evaluator uses
these classes instead of its own in every opset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TypeProto
from onnx.helper import tensor_dtype_to_np_dtype
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_conv_transpose, op_loop
from onnx.reference.ops.op_dequantize_linear import DequantizeLinear_25

from splitonnx.partitioner.native.convolutions import Conv
from splitonnx.partitioner.native.poolings import POOLINGS
from splitonnx.partitioner.native.recurrent_layers import RECURRENT_LAYERS

_FLAT_UNTIL = 12
"""The last opset in which Softmax, LogSoftmax and Hardmax flatten their input to a matrix."""


class BatchNormalization(OpRun):
    """Compute BatchNormalization with the running statistics in inference mode.

    Up to opset 13, onnx's own class uses the statistics of the batch instead.
    """

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


class DequantizeLinear(DequantizeLinear_25):
    """Compute DequantizeLinear, which onnx's evaluator lacks for opsets before 19."""

    op_domain = ""


class LRN(OpRun):
    """Compute LRN (local response normalization) for every channel.

    onnx's own class leaves out channels if there are more channels than samples.
    """

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


class Loop(op_loop.Loop):
    """Compute Loop; stack what the iterations compute along a new first axis.

    onnx's own class joins it along the existing first axis, fails if there is no iteration, and
    runs none if the condition is left out.
    """

    op_domain = ""
    body: Any  # onnx sets both from the node's attribute
    _run_body: Any

    def _run(
        self,
        most: np.ndarray | None,
        condition: np.ndarray | None,
        *first: np.ndarray,
        context: Mapping[str, Any] | None = None,
        body: object = None,
        attributes: Mapping[str, Any] | None = None,
        bindings: object = None,
    ) -> tuple[np.ndarray, ...]:
        del body, bindings  # onnx's evaluator hands them over
        names = self.body.input_names
        carried: Sequence[np.ndarray] = first
        rows: list[Sequence[np.ndarray]] = []
        going = condition is None or bool(np.all(condition))
        while going and (most is None or len(rows) < int(np.squeeze(most))):
            given = (np.array(len(rows)), np.array(True), *carried)
            values = {**(context or {}), **dict(zip(names, given, strict=True))}
            made = self._run_body(values, attributes=attributes)
            going, carried = bool(np.all(made[0])), made[1 : self.N + 1]
            rows.append(made[self.N + 1 :])
        if rows:
            return (*carried, *map(np.stack, zip(*rows, strict=True)))
        return (*carried, *map(_make_empty, self.body.output_types[self.N + 1 :]))


def _make_empty(kind: TypeProto) -> np.ndarray:
    """Return what a Loop without an iteration stacks: no rows of the type ``kind``."""
    tensor = kind.tensor_type
    shape = (0, *(dim.dim_value for dim in tensor.shape.dim))
    return np.empty(shape, tensor_dtype_to_np_dtype(tensor.elem_type))


class LpNormalization(OpRun):
    """Compute LpNormalization by dividing by the p-norm of the absolute values.

    onnx's own class uses the values with their signs, which is wrong for p = 1.
    """

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int = -1, p: int = 2) -> tuple[np.ndarray]:
        size = (np.abs(x) ** p).sum(axis, keepdims=True) ** (1 / p)
        normal = np.divide(x, size, out=np.zeros_like(x), where=size != 0)
        return (normal.astype(x.dtype),)


class ConvTranspose(OpRun):
    """Compute ConvTranspose; apply the weights and biases of each group to that group alone.

    onnx's own class confuses the weights and biases of different groups.
    """

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
    """Compute Softmax over ``axis`` and, up to opset 12, over all later axes too.

    onnx's own class normalizes over a single axis in every opset.
    """

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
        axes = _find_axes(self, x.ndim)
        powers = np.exp(x - x.max(axes, keepdims=True))
        return ((powers / powers.sum(axes, keepdims=True)).astype(x.dtype),)


class LogSoftmax(OpRun):
    """Compute LogSoftmax, the logarithm of :class:`Softmax`, over the same axes."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
        axes = _find_axes(self, x.ndim)
        gap = x - x.max(axes, keepdims=True)
        return ((gap - np.log(np.exp(gap).sum(axes, keepdims=True))).astype(x.dtype),)


class Hardmax(OpRun):
    """Compute Hardmax over the axes of :class:`Softmax`: 1 at the first maximum, 0 elsewhere."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
        axes = _find_axes(self, x.ndim)
        moved = np.moveaxis(x, axes, range(-len(axes), 0))
        rows = moved.reshape(*moved.shape[: -len(axes)], -1)
        hot = np.arange(rows.shape[-1]) == rows.argmax(-1)[..., None]
        made = np.moveaxis(hot.reshape(moved.shape), range(-len(axes), 0), axes)
        return (made.astype(x.dtype),)


def _find_axes(op: OpRun, rank: int) -> tuple[int, ...]:
    """Return the axes over which Softmax, LogSoftmax or Hardmax is computed."""
    is_old = op.run_params["opsets"][""] <= _FLAT_UNTIL
    given = [a.i for a in op.onnx_node.attribute if a.name == "axis"]
    axis = given[0] if given else 1 if is_old else -1
    return tuple(range(axis % rank, rank)) if is_old else (axis % rank,)


CORRECTIONS: tuple[type[OpRun], ...] = (
    BatchNormalization,
    Conv,
    ConvTranspose,
    DequantizeLinear,
    LRN,
    Loop,
    LpNormalization,
    Softmax,
    LogSoftmax,
    Hardmax,
    *POOLINGS,
    *RECURRENT_LAYERS,
)
"""The classes that the evaluator uses instead of its own."""
