"""Operators in float64, where onnx's own evaluator rounds them to float32 on the way."""

from __future__ import annotations

from types import FunctionType, SimpleNamespace

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_causal_conv_with_state import CausalConvWithState
from onnx.reference.ops.op_dynamic_quantize_linear import DynamicQuantizeLinear
from onnx.reference.ops.op_linear_attention import LinearAttention
from onnx.reference.ops.op_scatter_elements import ScatterElements

from tests.support.keyed import draw_words


class BatchNormalization(OpRun):
    """As of opset 15 at every opset; onnx's own evaluator uses the batch's statistics up to 13."""

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
        rows = np.moveaxis(x, 1, -1)
        flat = rows.reshape(-1, rows.shape[-1])
        if not training_mode:
            return (np.moveaxis((rows - mean) / np.sqrt(var + epsilon) * scale + bias, -1, 1),)
        now, spread = flat.mean(0), flat.var(0)
        normal = (rows - now) / np.sqrt(spread + epsilon) * scale + bias
        kept = (mean * momentum + now * (1 - momentum), var * momentum + spread * (1 - momentum))
        return (np.moveaxis(normal, -1, 1), *kept)


class GroupNormalization(OpRun):
    """As of opset 21: scale and bias are per channel."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        scale: np.ndarray,
        bias: np.ndarray,
        epsilon: float = 1e-5,
        num_groups: int = 1,
        stash_type: int = 1,
    ) -> tuple[np.ndarray]:
        rows = x.reshape(len(x), num_groups, -1)
        centred = rows - rows.mean(-1, keepdims=True)
        normal = centred / np.sqrt(rows.var(-1, keepdims=True) + epsilon)
        spread = (1, -1) + (1,) * (x.ndim - 2)
        return (normal.reshape(x.shape) * scale.reshape(spread) + bias.reshape(spread),)


class Mean(OpRun):
    """Of arrays that broadcast in any order; onnx's own evaluator adds to the first in place."""

    op_domain = ""

    def _run(self, *arrays: np.ndarray) -> tuple[np.ndarray]:
        return (sum(arrays[1:], arrays[0]) / np.array(len(arrays), arrays[0].dtype),)


class LRN(OpRun):
    """With every channel; onnx's own evaluator looks at as many as there are samples."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        alpha: float = 1e-4,
        beta: float = 0.75,
        bias: float = 1.0,
        size: int = 1,
    ) -> tuple[np.ndarray]:
        before = (size - 1) // 2
        padded = np.pad(x**2, ((0, 0), (before, size - 1 - before), (0, 0), (0, 0)))
        sums = sum(padded[:, start : start + x.shape[1]] for start in range(size))
        return (x * (bias + alpha / size * sums) ** -beta,)


class ConvTranspose(OpRun):
    """By definition, each element times the kernel; onnx's own evaluator mixes up the groups."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        w: np.ndarray,
        b: np.ndarray | None = None,
        auto_pad: str = "NOTSET",
        dilations: tuple[int, ...] | None = None,
        group: int = 1,
        kernel_shape: tuple[int, ...] | None = None,
        output_padding: tuple[int, ...] | None = None,
        output_shape: tuple[int, ...] | None = None,
        pads: tuple[int, ...] | None = None,
        strides: tuple[int, ...] | None = None,
    ) -> tuple[np.ndarray]:
        count, kernel, inner = x.ndim - 2, w.shape[2:], x.shape[2:]
        steps, spread = strides or (1,) * count, dilations or (1,) * count
        extra = output_padding or (0,) * count
        full = [
            step * (size - 1) + (extent - 1) * wide + 1 + more
            for step, size, extent, wide, more in zip(
                steps, inner, kernel, spread, extra, strict=True
            )
        ]
        if output_shape is not None or auto_pad.startswith("SAME"):
            wanted = output_shape or [n * s for n, s in zip(inner, steps, strict=True)]
            full = [max(have, want) for have, want in zip(full, wanted, strict=True)]
            cut = [have - want for have, want in zip(full, wanted, strict=True)]
            small = [each // 2 for each in cut]
            large = [each - each // 2 for each in cut]
            upper = auto_pad == "SAME_UPPER"
            pads = (*small, *large) if upper else (*large, *small)
        pads = pads or (0,) * (2 * count)
        each = w.shape[1]
        made = np.zeros((len(x), each * group, *full), x.dtype)
        for channel, place in np.ndindex(x.shape[1], int(np.prod(kernel))):
            at = [int(i) for i in np.unravel_index(place, kernel)]
            first = channel // (x.shape[1] // group) * each
            spans = tuple(
                slice(i * wide, i * wide + step * (size - 1) + 1, step)
                for i, wide, step, size in zip(at, spread, steps, inner, strict=True)
            )
            own = w[channel].reshape(each, -1)[:, place]
            factor = own.reshape(1, each, *(1,) * count)
            made[(slice(None), slice(first, first + each), *spans)] += (
                x[:, channel : channel + 1] * factor
            )
        inside = tuple(slice(pads[axis], full[axis] - pads[axis + count]) for axis in range(count))
        result = made[(slice(None), slice(None), *inside)]
        return (result if b is None else result + b.reshape(1, -1, *(1,) * count),)


def _soften(kind: str) -> type[OpRun]:
    """Make Softmax or one like it, over a matrix where the opset is below 13."""

    def run(self: OpRun, x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
        old = self.run_params["opsets"][""] < 13
        given = [a.i for a in self.onnx_node.attribute if a.name == "axis"]
        place = given[0] if given else (1 if old else -1)
        rows = x.reshape(int(np.prod(x.shape[:place])), -1) if old else np.moveaxis(x, place, -1)
        if kind == "Hardmax":
            made = np.zeros_like(rows)
            np.put_along_axis(made, rows.argmax(-1)[..., None], 1, -1)
        else:
            log = rows - rows.max(-1, keepdims=True)
            log = log - np.log(np.exp(log).sum(-1, keepdims=True))
            made = log if kind == "LogSoftmax" else np.exp(log)
        return (made.reshape(x.shape) if old else np.moveaxis(made, -1, place),)

    return type(kind, (OpRun,), {"op_domain": "", "_run": run})


class LpNormalization(OpRun):
    """x / norm; onnx's own evaluator takes no absolute values for p = 1."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int = -1, p: int = 2) -> tuple[np.ndarray]:
        norm = (np.abs(x) ** p).sum(axis, keepdims=True) ** (1 / p)
        return (np.where(norm == 0, 0.0, x / np.where(norm == 0, 1.0, norm)),)


class MeanVarianceNormalization(OpRun):
    """(x - mean) / (deviation + 1e-9)."""

    op_domain = ""

    def _run(self, x: np.ndarray, axes: tuple[int, ...] = (0, 2, 3)) -> tuple[np.ndarray]:
        axes = tuple(axes)
        deviation = x.std(axes, keepdims=True) + 1e-9
        return ((x - x.mean(axes, keepdims=True)) / deviation,)


class Scatter(ScatterElements):
    """ScatterElements under the name that it had before opset 11."""

    op_domain = ""


_NO_KEY = (0, 0, 0)
"""The key with which the node cases run."""
_NAME = "y"
"""The name of their only node, which prepare() names after its first output."""


class Bernoulli(OpRun):
    """With numbers from the key."""

    op_domain = ""

    def _run(
        self, x: np.ndarray, dtype: int | None = None, seed: float | None = None
    ) -> tuple[np.ndarray]:
        name = _NAME if seed is None else f"{_NAME}/{seed}"
        drawn = (draw_words(_NO_KEY, name, x.size) >> np.uint32(8)) * 2.0**-24
        return ((drawn.reshape(x.shape) < x).astype(x.dtype),)


class Dropout(OpRun):
    """With a mask from the key."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        ratio: np.ndarray | float = 0.5,
        training_mode: np.ndarray | bool = False,
        seed: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        ratio = float(ratio) if training_mode else 0.0
        words = draw_words(_NO_KEY, _NAME, x.size)
        kept = (words < round((1 - ratio) * 2**32)).reshape(x.shape)
        kept = kept if ratio else np.ones_like(kept)
        return x * kept / (1 - ratio), kept


def _widen(operator: type[OpRun]) -> type[OpRun]:
    """Copy an operator of onnx's evaluator, with float64 wherever it says float32."""
    run = operator._run
    numpy = SimpleNamespace(**{**vars(np), "float32": np.float64})
    wide = FunctionType(run.__code__, {**run.__globals__, "np": numpy}, None, run.__defaults__)
    return type(operator.__name__, (operator,), {"_run": wide, "op_domain": ""})


class GlobalLpPool(OpRun):
    """The p-norm of each channel; onnx's own evaluator has none."""

    op_domain = ""

    def _run(self, x: np.ndarray, p: int = 2) -> tuple[np.ndarray]:
        axes = tuple(range(2, x.ndim))
        return ((np.abs(x) ** p).sum(axes, keepdims=True) ** (1 / p),)


class MaxRoiPool(OpRun):
    """The largest element of each cell of a region, borders rounded; onnx's evaluator has none."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        rois: np.ndarray,
        pooled_shape: tuple[int, ...] = (),
        spatial_scale: float = 1.0,
    ) -> tuple[np.ndarray]:
        rows, columns = pooled_shape
        result = np.zeros((len(rois), x.shape[1], rows, columns), x.dtype)
        for index, (batch, *corners) in enumerate(rois):
            left, top, right, bottom = (int(np.round(c * spatial_scale)) for c in corners)
            high = max(bottom - top + 1, 1) / rows
            wide = max(right - left + 1, 1) / columns
            for row, column in np.ndindex(rows, columns):
                ys = slice(int(top + np.floor(row * high)), int(top + np.ceil((row + 1) * high)))
                xs = slice(
                    int(left + np.floor(column * wide)), int(left + np.ceil((column + 1) * wide))
                )
                cell = x[int(batch), :, ys, xs]
                if cell.size:
                    result[index, :, row, column] = cell.max((1, 2))
        return (result,)


DOUBLES: tuple[type[OpRun], ...] = (
    BatchNormalization,
    ConvTranspose,
    LRN,
    Mean,
    _soften("Hardmax"),
    _soften("LogSoftmax"),
    _soften("Softmax"),
    Bernoulli,
    GlobalLpPool,
    MaxRoiPool,
    _widen(CausalConvWithState),
    Dropout,
    _widen(DynamicQuantizeLinear),
    _widen(LinearAttention),
    GroupNormalization,
    LpNormalization,
    MeanVarianceNormalization,
    Scatter,
)
