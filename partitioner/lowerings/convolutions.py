"""Replace ConvGrad for any number of spatial dimensions, groups, strides and dilations.

The gradient of the input is itself a convolution, with flipped weights and with swapped input and
output channels; if there is a stride, it is a ConvTranspose instead.

The gradient of the weights is one product of matrices per kernel element: the gradient of the
output, and the elements of the input that this kernel element met, which a strided Slice gathers.
Stacking these for a single product (im2col) takes longer than the product.  N is the number of
images, L the number of windows of an image, M and C the output's and the input's channels, g the
number of groups, and k the number of kernel elements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims, take_inputs
from splitonnx.partitioner.graphs.faults import describe_node

_END = 2**31 - 1
_MANY_WINDOWS = 1024
"""Windows of an image from which a product for each image is faster than one for all."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The attributes of a convolution, each with one entry per spatial dimension.

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
    window = read_window(node, x, w)
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


def read_window(node: ir.Node, x: ir.Value, w: ir.Value) -> Window:
    """Read the attributes of a ConvGrad of the input ``x`` and the weights ``w``.

    Raises:
        UnsupportedModel: the shape of the weights, or the rank of the input, is not known.
    """
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
    return Window(
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        before=pads[:rank],
        after=pads[rank:],
        size=tuple(size[2:]),
        groups=node.attributes.get_int("group", 1),
    )


def _grad_input(
    builder: NodeBuilder, node: ir.Node, dy: ir.Value, x: ir.Value, w: ir.Value, window: Window
) -> ir.Value:
    convolved = _convolve_gradient(builder, dy, w, window)
    if convolved is not None:
        return convolved
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


def convolve_gradient(builder: NodeBuilder, node: ir.Node) -> ir.Value | None:
    """Return the gradient of the input of a ConvGrad, computed by a Conv.

    Return ``None`` if a stride is not 1, if there is more padding than the kernel reaches, or if
    the shape of the weights or the input is not known.
    """
    dy, x, w = take_inputs(node, 3)
    shape = known_dims(w)
    if shape is None or None in shape or known_dims(x) is None:
        return None
    return _convolve_gradient(builder, dy, w, read_window(node, x, w))


def _convolve_gradient(
    builder: NodeBuilder, dy: ir.Value, w: ir.Value, window: Window
) -> ir.Value | None:
    mirrored = [r - b for r, b in zip(window.reach, window.before, strict=True)]
    mirrored += [r - a for r, a in zip(window.reach, window.after, strict=True)]
    if any(stride != 1 for stride in window.strides) or min(mirrored) < 0:
        return None
    return builder.op(
        "Conv",
        dy,
        _mirror_weights(builder, w, window),
        pads=mirrored,
        dilations=window.dilations,
        group=window.groups,
    )


def _mirror_weights(builder: NodeBuilder, w: ir.Value, window: Window) -> ir.Value:
    """Rearrange weights [M, C/g, k...] to [C, M/g, k...], flipped along the kernel axes.

    The shape is declared, as the runtime chooses a convolution's layout by it.
    """
    outputs, inputs, *kernel = known_dims(w) or []
    assert outputs is not None
    assert inputs is not None
    mirrored = _turn_weights(builder, w, (outputs, inputs), window)
    mirrored.type = w.type
    mirrored.shape = ir.Shape([window.groups * inputs, outputs // window.groups, *kernel])
    return mirrored


def _turn_weights(
    builder: NodeBuilder, w: ir.Value, channels: tuple[int, int], window: Window
) -> ir.Value:
    (outputs, inputs), kernel = channels, window.kernel
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


def _crop_input(builder: NodeBuilder, whole: ir.Value, x: ir.Value, window: Window) -> ir.Value:
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
    builder: NodeBuilder, dy: ir.Value, x: ir.Value, w: ir.Value, window: Window
) -> ir.Value:
    """Return the gradient [M, C/g, k...] by the form that is fastest for the sizes."""
    outputs, inputs, *_ = known_dims(w) or []
    assert outputs is not None
    assert inputs is not None
    if window.groups == outputs > 1 and inputs == 1:
        return _convolve_channels(builder, dy, x, window)
    if window.groups > 1:
        multiply = _multiply_groups
    elif math.prod(step or 0 for step in window.steps) >= _MANY_WINDOWS:
        multiply = _multiply_each_image
    else:
        multiply = _multiply_images
    products = multiply(builder, dy, x, outputs, inputs, window)
    return builder.op("Reshape", products, builder.integers([outputs, inputs, *window.kernel]))


def _convolve_channels(builder: NodeBuilder, dy: ir.Value, x: ir.Value, window: Window) -> ir.Value:
    """Convolve each channel of the input with its gradient, summed over the images.

    The images are the channels of a convolution with as many groups as channels, whose kernel is
    the gradient.  Stride and dilation change places.
    """
    rank, groups = len(window.kernel), window.groups
    swap = [1, 0, *range(2, 2 + rank)]
    images = builder.op("Transpose", x, perm=swap)  # [C, N, ...]
    shape = builder.op("Concat", builder.integers([1, -1]), builder.shape(x, 2), axis=0)
    images = builder.op("Reshape", images, shape)
    made = builder.op(
        "Conv",
        images,
        builder.op("Transpose", dy, perm=swap),
        pads=[*window.before, *window.after],
        strides=window.dilations,
        dilations=window.strides,
        group=groups,
    )
    made = builder.op("Transpose", made, perm=swap)  # [C, 1, ...], with what no window reaches
    zeros, axes = builder.integers([0] * rank), builder.integers(range(2, 2 + rank))
    return builder.op("Slice", made, zeros, builder.integers(window.kernel), axes)


def _multiply_each_image(
    builder: NodeBuilder, dy: ir.Value, x: ir.Value, outputs: int, inputs: int, window: Window
) -> ir.Value:
    """Multiply [C, L] by [L, M] for each image and kernel element, and add; return [M, C, k]."""
    count = math.prod(window.kernel)
    zero = builder.integers([0])
    rows = builder.op("Reshape", dy, builder.integers([0, outputs, -1]))
    pieces = [
        builder.op("Reshape", piece, builder.integers([0, inputs, -1]))
        for piece in _gather_windows(builder, x, dy, window, first=2)
    ]
    if count == 1 and inputs < outputs:  # the smaller one is transposed
        columns = builder.op("Transpose", pieces[0], perm=[0, 2, 1])
        return builder.op("ReduceSum", builder.op("MatMul", rows, columns), zero, keepdims=0)
    rows = builder.op("Transpose", rows, perm=[0, 2, 1])
    products = [
        builder.op("ReduceSum", builder.op("MatMul", piece, rows), zero, keepdims=0)
        for piece in pieces
    ]
    stacked = products[0] if count == 1 else builder.op("Concat", *products, axis=0)
    stacked = builder.op("Reshape", stacked, builder.integers([count, inputs, outputs]))
    return builder.op("Transpose", stacked, perm=[2, 1, 0])


def _multiply_images(
    builder: NodeBuilder, dy: ir.Value, x: ir.Value, outputs: int, inputs: int, window: Window
) -> ir.Value:
    """Multiply [M, N * L] by [N * L, C] for each kernel element; return [M, C, k]."""
    count, spatial = math.prod(window.kernel), range(2, 2 + len(window.kernel))
    last = [0, *spatial, 1]
    rows = builder.op("Transpose", dy, perm=last)  # [N, L..., M]
    rows = builder.op("Reshape", rows, builder.integers([-1, outputs]))
    pieces = _gather_windows(builder, builder.op("Transpose", x, perm=last), dy, window, first=1)
    products = [
        builder.op(
            "Gemm", rows, builder.op("Reshape", piece, builder.integers([-1, inputs])), transA=1
        )
        for piece in pieces
    ]
    if count == 1:
        return products[0]
    stacked = builder.op("Concat", *products, axis=0)
    stacked = builder.op("Reshape", stacked, builder.integers([count, outputs, inputs]))
    return builder.op("Transpose", stacked, perm=[1, 2, 0])


def _multiply_groups(
    builder: NodeBuilder, dy: ir.Value, x: ir.Value, outputs: int, inputs: int, window: Window
) -> ir.Value:
    """Multiply [C/g, N * L] by [N * L, M/g] for each group and kernel element."""
    groups, count = window.groups, math.prod(window.kernel)
    swap = [1, 0, *range(2, 2 + len(window.kernel))]
    rows = builder.op("Transpose", dy, perm=swap)  # [M, N, L...]
    rows = builder.op("Reshape", rows, builder.integers([groups, outputs // groups, -1]))
    rows = builder.op("Transpose", rows, perm=[0, 2, 1])
    pieces = _gather_windows(builder, builder.op("Transpose", x, perm=swap), dy, window, first=2)
    products = [
        builder.op(
            "MatMul", builder.op("Reshape", piece, builder.integers([groups, inputs, -1])), rows
        )
        for piece in pieces
    ]
    stacked = products[0] if count == 1 else builder.op("Concat", *products, axis=0)
    shape = [count, groups, inputs, outputs // groups]
    stacked = builder.op("Reshape", stacked, builder.integers(shape))
    return builder.op("Transpose", stacked, perm=[1, 3, 2, 0])


def _gather_windows(
    builder: NodeBuilder, x: ir.Value, dy: ir.Value, window: Window, *, first: int
) -> list[ir.Value]:
    """Return, for each kernel element, the elements of ``x`` that it multiplies.

    ``first`` is the first of the spatial axes of ``x``.
    """
    rank = len(window.kernel)
    after = [0] * (2 - first)
    if any(window.before) or any(window.after):
        pads = [*[0] * first, *window.before, *after, *[0] * first, *window.after, *after]
        x = builder.op("Pad", x, builder.integers(pads), mode="constant")
    axes, strides = builder.integers(range(first, first + rank)), builder.integers(window.strides)
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
