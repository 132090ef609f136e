"""Replace ConvGrad for any number of spatial dimensions, groups, strides and dilations.

The gradient of the input is itself a convolution, with flipped weights and with swapped input and
output channels; if there is a stride, it is a ConvTranspose instead.  The gradient of the weights
is a single product of two matrices: the gradient of the output and the windows of the input.  The
windows are gathered by one strided Slice per kernel element (im2col).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims
from splitonnx.partitioner.graphs.faults import describe_node

_END = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class _Window:
    """The attributes of a convolution, with one entry per spatial dimension.

    ``before`` and ``after`` are the padding.  ``size`` is the extent of the input, ``None`` if it
    is not known.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    size: tuple[int | None, ...]
    groups: int

    @property
    def reach(self) -> tuple[int, ...]:
        """The number of elements that a window spans, minus one."""
        return tuple(d * (k - 1) for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def steps(self) -> tuple[int | None, ...]:
        """The extent of the output, ``None`` if it is not known."""
        parts = zip(self.size, self.before, self.after, self.reach, self.strides, strict=True)
        return tuple(None if n is None else (n + b + a - r - 1) // s + 1 for n, b, a, r, s in parts)


def lower_conv_grad(builder: NodeBuilder, node: ir.Node) -> Sequence[ir.Value | None]:
    """Replace ConvGrad with Conv or ConvTranspose, a matrix product and a ReduceSum.

    Conv or ConvTranspose computes the gradient of the input, the matrix product computes the
    gradient of the weights, and ReduceSum the gradient of the bias.  Unused gradients are not
    computed.
    """
    dy, x, w = node.inputs[:3]
    assert dy is not None
    assert x is not None
    assert w is not None
    window = _read_window(node, x, w)
    wanted = [bool(v.name) and (bool(v.uses()) or v.is_graph_output()) for v in node.outputs]
    wanted += [False] * (3 - len(wanted))
    spatial = range(2, 2 + len(window.kernel))
    return [
        _grad_input(builder, node, dy, x, w, window) if wanted[0] else None,
        _grad_weights(builder, dy, x, w, window) if wanted[1] else None,
        builder.op("ReduceSum", dy, builder.integers([0, *spatial]), keepdims=0)
        if wanted[2]
        else None,
    ]


def _read_window(node: ir.Node, x: ir.Value, w: ir.Value) -> _Window:
    shape, size = known_dims(w), known_dims(x)
    if shape is None or None in shape or size is None:
        raise UnsupportedModel(
            describe_node(node), "the shape of its weights or input is not known"
        )
    kernel = tuple(dim for dim in shape[2:] if dim is not None)
    rank = len(kernel)
    ones = (1,) * rank
    strides = tuple(node.attributes.get_ints("strides", ones))
    dilations = tuple(node.attributes.get_ints("dilations", ones))
    pads = tuple(node.attributes.get_ints("pads", (0,) * (2 * rank)))
    return _Window(
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        before=pads[:rank],
        after=pads[rank:],
        size=tuple(size[2:]),
        groups=node.attributes.get_int("group", 1),
    )


def _grad_input(
    builder: NodeBuilder, node: ir.Node, dy: ir.Value, x: ir.Value, w: ir.Value, window: _Window
) -> ir.Value:
    mirrored = [r - b for r, b in zip(window.reach, window.before, strict=True)]
    mirrored += [r - a for r, a in zip(window.reach, window.after, strict=True)]
    if all(stride == 1 for stride in window.strides) and min(mirrored) >= 0:
        return builder.op(
            "Conv",
            dy,
            _mirror_weights(builder, w, window),
            pads=mirrored,
            dilations=window.dilations,
            group=window.groups,
        )
    # all elements that the windows cover, then the part that belongs to the input
    whole = builder.op(
        "ConvTranspose",
        dy,
        w,
        strides=window.strides,
        dilations=window.dilations,
        group=window.groups,
    )
    return _crop_input(builder, whole, x, window)


def _mirror_weights(builder: NodeBuilder, w: ir.Value, window: _Window) -> ir.Value:
    """Rearrange weights [M, C/g, k...] to [C, M/g, k...], flipped along the kernel axes."""
    outputs, inputs, *kernel = known_dims(w) or []
    assert outputs is not None
    assert inputs is not None
    groups, rank = window.groups, len(window.kernel)
    spatial = list(range(rank))
    if any(extent != 1 for extent in kernel):
        w = builder.op(
            "Slice",
            w,
            builder.integers([-1] * rank),
            builder.integers([-_END] * rank),
            builder.integers([2 + axis for axis in spatial]),
            builder.integers([-1] * rank),
        )
    if groups == 1:
        return builder.op("Transpose", w, perm=[1, 0, *(2 + axis for axis in spatial)])
    split = builder.integers([groups, outputs // groups, inputs, *window.kernel])
    w = builder.op(
        "Transpose", builder.op("Reshape", w, split), perm=[0, 2, 1, *(3 + a for a in spatial)]
    )
    return builder.op(
        "Reshape", w, builder.integers([groups * inputs, outputs // groups, *window.kernel])
    )


def _crop_input(builder: NodeBuilder, whole: ir.Value, x: ir.Value, window: _Window) -> ir.Value:
    """Cut the input's part out of ``whole``; elements outside all windows are 0."""
    rank = len(window.kernel)
    axes = builder.integers(range(2, 2 + rank))
    # the last window may end before the input, by less than a stride
    margin = [max(0, s - 1 - a) for s, a in zip(window.strides, window.after, strict=True)]
    if any(margin):
        whole = builder.op(
            "Pad", whole, builder.integers([0] * (2 + rank) + [0, 0, *margin]), mode="constant"
        )
    start = builder.integers(window.before)
    end = builder.op("Add", builder.shape(x, 2), start)
    return builder.op("Slice", whole, start, end, axes)


def _grad_weights(
    builder: NodeBuilder, dy: ir.Value, x: ir.Value, w: ir.Value, window: _Window
) -> ir.Value:
    """Multiply [M/g, N * L] by [N * L, k * C/g] in each group, with L windows per image."""
    outputs, inputs, *_ = known_dims(w) or []
    assert outputs is not None
    assert inputs is not None
    rank, groups, count = len(window.kernel), window.groups, math.prod(window.kernel)
    swap = [1, 0, *range(2, 2 + rank)]
    rows = builder.op("Transpose", dy, perm=swap)  # [M, N, L...]
    columns = _gather_windows(builder, builder.op("Transpose", x, perm=swap), dy, window)
    if groups == 1:
        rows = builder.op("Reshape", rows, builder.integers([outputs, -1]))
        flat = [builder.op("Reshape", c, builder.integers([inputs, -1])) for c in columns]
        stacked = flat[0] if count == 1 else builder.op("Concat", *flat, axis=0)
        product = builder.op("Gemm", rows, stacked, transB=1)  # [M, k * C]
        product = builder.op("Reshape", product, builder.integers([outputs, count, inputs]))
    else:
        rows = builder.op("Reshape", rows, builder.integers([groups, outputs // groups, -1]))
        flat = [builder.op("Reshape", c, builder.integers([groups, inputs, -1])) for c in columns]
        stacked = flat[0] if count == 1 else builder.op("Concat", *flat, axis=1)
        product = builder.op("MatMul", rows, builder.op("Transpose", stacked, perm=[0, 2, 1]))
        product = builder.op("Reshape", product, builder.integers([outputs, count, inputs]))
    moved = builder.op("Transpose", product, perm=[0, 2, 1])
    return builder.op("Reshape", moved, builder.integers([outputs, inputs, *window.kernel]))


def _gather_windows(
    builder: NodeBuilder, x: ir.Value, dy: ir.Value, window: _Window
) -> list[ir.Value]:
    """Return, for each kernel element, the elements of ``x`` [C, N, ...] that it multiplies."""
    rank = len(window.kernel)
    if any(window.before) or any(window.after):
        pads = [0, 0, *window.before, 0, 0, *window.after]
        x = builder.op("Pad", x, builder.integers(pads), mode="constant")
    axes, strides = builder.integers(range(2, 2 + rank)), builder.integers(window.strides)
    steps = window.steps
    found = []
    for offset in itertools.product(*(range(k) for k in window.kernel)):
        start = [o * d for o, d in zip(offset, window.dilations, strict=True)]
        if all(step is not None for step in steps):
            parts = zip(start, steps, window.strides, strict=True)
            end = [b + ((n or 1) - 1) * s + 1 for b, n, s in parts]
            found.append(
                builder.op(
                    "Slice", x, builder.integers(start), builder.integers(end), axes, strides
                )
            )
            continue
        piece = builder.op(
            "Slice", x, builder.integers(start), builder.integers([_END] * rank), axes, strides
        )
        zeros = builder.integers([0] * rank)
        found.append(builder.op("Slice", piece, zeros, builder.shape(dy, 2), axes))
    return found
