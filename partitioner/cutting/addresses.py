"""Add checks before kernels that compute memory addresses from values chosen by a peer.

Each function builds checks for one node.  It returns a mapping from the index of each checked input
to the value that replaces this input; the mapping is empty if no check is needed.  If a check fails
while the graph runs, the stage ends with an error before the kernel is called.

Without these checks, the kernels of onnxruntime-training 1.19.2 do the following.  Each case was
tested in its own process, with known bytes planted in memory:

- GridSample reads outside the image if it reflects a distant coordinate, or if it reflects in an
  image of a single pixel.
- RoiAlign accepts any image (batch) index and any box size.
- MaxUnpool crashes the process on an index outside its output.
- Pad reads outside an axis when it reflects or wraps, and leaves memory uninitialized if an axis is
  cropped to length zero.
- Col2Im, AffineGrid, LSTM, GRU, RNN and convolutions with a bias do not check that sizes match.
- DFT along the axis of the imaginary parts leaves memory uninitialized.
- STFT divides by the frame length.

Compress and MaxRoiPool check their inputs themselves and need no check here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.assertions import (
    BOOL,
    I64,
    either,
    known_sizes,
    note,
    pass_if,
    refuse_where,
    require_rank,
    reshape,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array

Checked = Mapping[int, ir.Value]

_GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}
_PERIOD = 4.0
"""Reflected coordinates repeat after this distance, measured in half lengths of an image."""
_REACH = 4
"""Limit of a RoiAlign box's coordinates, in image lengths, if larger boxes take more samples."""
_FIXED_REACH = 1 << 20
"""Limit of a RoiAlign box's coordinates, in image lengths, if each bin takes a fixed number."""


def check_places(builder: NodeBuilder, node: ir.Node) -> Checked:
    """Limit and check the coordinates of a GridSample node that reflects at the image border.

    Coordinates from -1 to 1 are inside the image, and reflection repeats with period 4.  So each
    coordinate is replaced by its remainder modulo 4, which reflects to the same pixel.  A check
    fails at run time if a coordinate is NaN or infinite.  If the node sets ``align_corners``, a
    check also fails if an axis of the image is only one pixel long.

    Raises:
        UnsupportedModel: ``align_corners`` is set, and an axis is known to be one pixel long.
    """
    image, places = node.inputs[:2]
    if node.attributes.get_string("padding_mode", "zeros") != "reflection":
        return {}
    assert image is not None
    assert places is not None
    near = builder.op("Mod", places, builder.number(_PERIOD, places.dtype), fmod=1)
    near = note(near, places.dtype, places.shape)
    checked = {1: pass_if(builder, near, refuse_where(builder, builder.op("IsNaN", near)))}
    if not node.attributes.get_int("align_corners", 0):
        return checked
    sizes = known_sizes(image, 2)
    if sizes is None:
        small = builder.op("Less", builder.op("Shape", image, start=2), builder.integer(2))
        checked[0] = pass_if(builder, image, refuse_where(builder, small))
    elif min(sizes, default=2) < 2:
        raise UnsupportedModel(
            f"GridSample '{node.name}'",
            "it reflects at the corners of an image that is one pixel wide",
            "use padding_mode 'border', which is the same there",
        )
    return checked


def check_boxes(builder: NodeBuilder, node: ir.Node) -> Checked:
    """Build checks that the boxes of a RoiAlign node refer to existing images and are near them.

    RoiAlign divides each box into bins and samples the image in each bin.  If the number of samples
    depends on the box size, RoiAlign stores all samples at once, so coordinates are limited to 4
    image lengths.  If the number is fixed, the limit is 2**20 image lengths.
    """
    image, boxes, numbers = node.inputs[:3]
    assert image is not None
    assert boxes is not None
    assert numbers is not None
    scale = node.attributes.get_float("spatial_scale", 1.0)
    count = builder.op("Squeeze", builder.shape(image, 0, 1))
    images = builder.op("Range", builder.integer(0), count, builder.integer(1))
    looked_up = builder.op("Gather", note(images, I64), numbers, axis=0)
    lengths = _FIXED_REACH if node.attributes.get_int("sampling_ratio", 0) > 0 else _REACH
    length = builder.op("ReduceMax", builder.shape(image, 2), keepdims=0)
    reach = builder.op(
        "Mul",
        builder.cast(note(length, I64), boxes.dtype),
        builder.number(lengths / max(abs(scale), 1e-6), boxes.dtype),
    )
    distance = note(builder.op("Abs", boxes), boxes.dtype)
    is_near = note(builder.op("LessOrEqual", distance, note(reach, boxes.dtype)), BOOL)
    is_far = builder.op("Not", is_near)  # NaN too
    return {
        1: pass_if(builder, boxes, refuse_where(builder, is_far)),
        2: note(looked_up, I64, numbers.shape),
    }


def check_unpooled(builder: NodeBuilder, node: ir.Node) -> Checked:
    """Build a check that each index read by a MaxUnpool node is inside the node's output."""
    x, places, wanted = [*node.inputs, None][:3]
    assert x is not None
    assert places is not None
    if wanted is not None:
        total = builder.op("ReduceProd", wanted, keepdims=0)
    else:
        kernel = np.array(node.attributes.get_ints("kernel_shape"))
        strides = np.array(node.attributes.get_ints("strides", [1] * len(kernel)))
        pads = np.array(node.attributes.get_ints("pads", [0] * (2 * len(kernel))))
        rest = kernel - strides - pads.reshape(2, -1).sum(axis=0)
        sizes = builder.op("Mul", builder.shape(x, 2), builder.integers(strides.tolist()))
        sizes = builder.op("Add", sizes, builder.integers(rest.tolist()))
        area = builder.op("ReduceProd", note(sizes, I64), keepdims=0)
        rows = builder.op("ReduceProd", builder.shape(x, 0, 2), keepdims=0)
        total = builder.op("Mul", note(rows, I64), note(area, I64))
    every = builder.op("Range", builder.integer(0), note(total, I64), builder.integer(1))
    return {1: note(builder.op("Gather", note(every, I64), places, axis=0), I64, places.shape)}


def check_widths(builder: NodeBuilder, node: ir.Node) -> Checked:
    """Build a check that a Pad node's input is long enough on each axis for the padding.

    Negative padding crops the input.  No check is built if it could never fail.
    """
    x, widths, _, axes = [*node.inputs, None, None, None][:4]
    assert x is not None
    assert widths is not None
    mode = node.attributes.get_string("mode", "constant")
    known = known_array(widths)
    if known is not None and (not known.any() or (mode == "constant" and (known >= 0).all())):
        return {}
    if known is not None and axes is None:
        least = _find_least(known.reshape(2, -1), mode)
        sizes = known_sizes(x)
        if sizes is not None and (np.array(sizes) >= least).all():
            return {}
        small = builder.op("Less", builder.op("Shape", x), builder.integers(least.tolist()))
        return {0: pass_if(builder, x, refuse_where(builder, small))}
    shape = note(builder.op("Shape", x), I64)
    if axes is not None:
        shape = note(builder.op("Gather", shape, axes, axis=0), I64)
    halves = builder.op("Reshape", widths, builder.integers([2, -1]))
    zero = builder.integer(0)
    cut = builder.op(
        "ReduceSum", note(builder.op("Min", halves, zero), I64), builder.integers([0]), keepdims=0
    )
    kept = note(builder.op("Add", shape, note(cut, I64)), I64)
    most = note(builder.op("ReduceMax", halves, builder.integers([0]), keepdims=0), I64)
    grows = builder.op("Greater", most, zero)
    needed = builder.cast(note(grows, ir.DataType.BOOL), I64)
    bad = [builder.op("Less", kept, needed)]
    if mode in ("reflect", "wrap"):
        lent = most if mode == "wrap" else builder.op("Add", most, needed)
        bad.append(builder.op("Less", kept, note(lent, I64)))
    return {0: pass_if(builder, x, refuse_where(builder, either(builder, *bad)))}


def _find_least(widths: np.ndarray, mode: str) -> np.ndarray:
    """Compute how long each axis must be at least, given the padding before and after it."""
    most = np.maximum(widths.max(axis=0), 0)
    needed = (most > 0).astype(np.int64)
    lent = {"reflect": most + needed, "wrap": np.maximum(most, needed)}.get(mode, needed)
    return np.asarray(lent - np.minimum(widths, 0).sum(axis=0))


def check_columns(builder: NodeBuilder, node: ir.Node) -> Checked:
    """Build a check that a Col2Im node's input has one column for each block position in the image.

    Raises:
        UnsupportedModel: the image's number of dimensions is not known.
    """
    x, image, block = node.inputs[:3]
    assert x is not None
    assert image is not None
    assert block is not None
    rank = (known_sizes(image) or known_sizes(block) or [len(_list(node, "strides"))])[0]
    if not rank:
        require_rank(x)
        raise UnsupportedModel(
            f"Col2Im '{node.name}'", "the rank of its image is not known", "export it with shapes"
        )
    strides, dilations = (
        builder.integers(_list(node, name) or [1] * rank) for name in ("strides", "dilations")
    )
    pads = np.array(_list(node, "pads") or [0] * (2 * rank)).reshape(2, -1).sum(axis=0)
    one, same = builder.integer(1), builder.integers([rank])
    image, block = (note(builder.op("Reshape", given, same), I64) for given in (image, block))
    reach = builder.op("Mul", note(builder.op("Sub", block, one), I64), dilations)
    room = builder.op(
        "Sub",
        note(builder.op("Add", image, builder.integers((pads - 1).tolist())), I64),
        note(reach, I64),
    )
    steps = note(builder.op("Div", note(room, I64), strides), I64)
    count = builder.op("ReduceProd", note(builder.op("Add", steps, one), I64), keepdims=0)
    size = note(builder.op("ReduceProd", block, keepdims=0), I64)
    over = builder.op(
        "Mod",
        builder.op("Squeeze", builder.shape(x, 1, 2)),
        note(builder.op("Max", size, one), I64),
    )
    columns = builder.op("Squeeze", builder.shape(x, 2, 3))
    low = builder.op(
        "Less", builder.op("Min", block, image, note(builder.op("Add", room, one), I64)), one
    )
    bad = either(
        builder,
        low,
        builder.op("Not", builder.op("Equal", columns, note(count, I64))),
        builder.op("Not", builder.op("Equal", note(over, I64), builder.integer(0))),
    )
    return {0: pass_if(builder, x, refuse_where(builder, bad))}


def _list(node: ir.Node, name: str) -> list[int]:
    return list(node.attributes.get_ints(name, []))


def check_matrices(builder: NodeBuilder, node: ir.Node) -> Checked:
    """Build a check that an AffineGrid node gets one matrix of the right shape for each image."""
    matrices, size = node.inputs[:2]
    assert matrices is not None
    assert size is not None
    known = known_array(size)
    if known is not None and known_sizes(matrices) == [known[0], len(known) - 2, len(known) - 1]:
        return {}
    axes = builder.op("Squeeze", builder.op("Shape", size))
    first = builder.op("Slice", size, *(builder.integers([number]) for number in (0, 1)))
    places = builder.integers([0, 1, 2])
    rest = builder.op("Sub", builder.op("Add", note(axes, I64), places), builder.integer(3))
    is_first = builder.array(np.array([True, False, False]), ir.DataType.BOOL)
    shape = builder.op("Where", is_first, note(first, I64), note(rest, I64))
    fits = builder.op("Equal", builder.op("Shape", matrices), note(shape, I64))
    return {0: pass_if(builder, matrices, refuse_where(builder, builder.op("Not", fits)))}


def check_axis(builder: NodeBuilder, node: ir.Node) -> Checked:
    """Check that a DFT node does not transform the last axis, that of real and imaginary parts.

    If the axis is not known yet, build a check that fails at run time.

    Raises:
        UnsupportedModel: the axis is already known to be the last one.
    """
    x = node.inputs[0]
    assert x is not None
    axis = node.inputs[2] if len(node.inputs) > 2 else None
    stated = node.attributes.get("axis")
    known = known_array(axis)
    if axis is not None and known is None:
        rank = require_rank(x)
        table = builder.integers([*range(rank - 1), rank, *range(rank - 1), rank])
        place = note(builder.op("Add", axis, builder.integer(rank)), I64)
        found = note(builder.op("Gather", table, place, axis=0), I64)
        return {2: note(found, I64, axis.shape)}
    number = int(known) if known is not None else stated.as_int() if stated is not None else -2
    if number == -1 or (x.shape is not None and number == len(x.shape) - 1):
        raise UnsupportedModel(
            f"DFT '{node.name}'", "its axis is that of the imaginary parts", "name another axis"
        )
    return {}


def check_features(builder: NodeBuilder, node: ir.Node) -> Checked:
    """Build checks that the weights of an LSTM, GRU or RNN node fit its input and hidden sizes."""
    x, weights, own = node.inputs[:3]
    assert x is not None
    assert weights is not None
    assert own is not None
    width = node.attributes.get_int("hidden_size", 0)
    both = node.attributes.get_string("direction", "forward") == "bidirectional"
    rows = [2 if both else 1, _GATES[node.op_type] * width]
    checked = {}
    features = known_sizes(x, 2, 3)
    if features is None or known_sizes(weights) != [*rows, *features]:
        bad = either(
            builder,
            _differs(builder, builder.shape(weights, 0, 2), builder.integers(rows)),
            _differs(builder, builder.shape(weights, 2, 3), builder.shape(x, 2, 3)),
        )
        checked[1] = pass_if(builder, weights, refuse_where(builder, bad))
    if known_sizes(own) != [*rows, width]:
        bad = _differs(builder, builder.op("Shape", own), builder.integers([*rows, width]))
        checked[2] = pass_if(builder, own, refuse_where(builder, bad))
    return checked


def _differs(builder: NodeBuilder, found: ir.Value, wanted: ir.Value) -> ir.Value:
    """Build a BOOL scalar that is true if two vectors of sizes differ in any element."""
    distance = builder.op("Abs", note(builder.op("Sub", note(found, I64), note(wanted, I64)), I64))
    total = builder.op("ReduceSum", note(distance, I64), keepdims=0)
    return note(builder.op("Greater", note(total, I64), builder.integer(0)), BOOL)


def check_bias(builder: NodeBuilder, node: ir.Node) -> Checked:
    """Build a check that a convolution's bias has one element per filter.

    The node is a Conv, ConvTranspose or QLinearConv.
    """
    at, weights_at = (8, 3) if node.op_type == "QLinearConv" else (2, 1)
    bias, weights = [*node.inputs, *[None] * 9][at], node.inputs[weights_at]
    if bias is None or weights is None:
        return {}
    axis = 1 if node.op_type == "ConvTranspose" else 0
    groups = node.attributes.get_int("group", 1) if axis else 1
    filters = known_sizes(weights, axis, axis + 1)
    if filters is not None and known_sizes(bias) == [filters[0] * groups]:
        return {}
    shape = builder.shape(weights, axis, axis + 1)
    if groups != 1:
        shape = note(builder.op("Mul", shape, builder.integer(groups)), I64)
    return {at: reshape(builder, bias, shape)}


def check_frames(builder: NodeBuilder, node: ir.Node) -> Checked:
    """Build a check that the frame length of an STFT node is positive."""
    step, _, length = [*node.inputs, None, None, None][1:4]
    known = known_array(length)
    if length is None or step is None or (known is not None and known.min() > 0):
        return {}
    bad = builder.op("Less", builder.cast(length, I64), builder.integer(1))
    return {3: pass_if(builder, length, refuse_where(builder, bad))}


ADDRESS_CHECKS = {
    "AffineGrid": check_matrices,
    "Col2Im": check_columns,
    "Conv": check_bias,
    "ConvTranspose": check_bias,
    "DFT": check_axis,
    "GRU": check_features,
    "GridSample": check_places,
    "LSTM": check_features,
    "MaxUnpool": check_unpooled,
    "Pad": check_widths,
    "QLinearConv": check_bias,
    "RNN": check_features,
    "RoiAlign": check_boxes,
    "STFT": check_frames,
}
