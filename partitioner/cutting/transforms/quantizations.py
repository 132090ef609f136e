"""Codecs that round every number: to 16 bits, to 8 bits by channel, or to 4 bits by block.

All are made of standard operators.  Where a tensor is not finite, what is sent is not finite
either, except in ``bf16``, whose codes are integers that stand for infinity and NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.cutting.transforms.encodings import (
    TINIEST,
    Piece,
    count_row,
    poison,
    refuse_rank,
    refuse_rows,
    restore_shape,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.tensors import TensorSpec

_F32, _I32 = ir.DataType.FLOAT, ir.DataType.INT32
_LARGEST = float(np.finfo(np.float32).max)
BLOCK = 64
"""The number of consecutive elements that share a scale in ``int4``."""


class Float16:
    """Sends ``x`` rounded to the nearest float16; numbers above 65504 become infinite."""

    def refuse(self, tensor: TensorSpec) -> str:
        """Return an empty string, since every float has a nearest float16."""
        return ""

    def encode(self, builder: NodeBuilder, value: ir.Value, tensor: TensorSpec) -> list[Piece]:
        """``float16(x)``."""
        made = builder.op("Cast", value, to=ir.DataType.FLOAT16.value)
        return [Piece(suffix="fp16", value=made, dtype="F16", shape=tensor.shape)]

    def decode(
        self, builder: NodeBuilder, pieces: Sequence[ir.Value], tensor: TensorSpec
    ) -> ir.Value:
        """``float32(code)``."""
        return builder.op("Cast", pieces[0], to=_F32.value)


class BrainFloat16:
    """Sends the upper 16 bits of ``x``, rounded to nearest even, as unsigned integers.

    Neither numpy nor the packages for JavaScript have the type bfloat16, and no operator reads the
    bits of a float.  They are computed: for ``2**e <= |x| < 2**(e + 1)``, and ``e`` at least -126,
    they are ``128 (e + 126) + round(128 |x| / 2**e)``.  Beside a power of two, where the logarithm
    may be rounded to the wrong ``e``, both give the same.
    """

    def refuse(self, tensor: TensorSpec) -> str:
        """Return an empty string, since every float has a nearest bfloat16."""
        return ""

    def encode(self, builder: NodeBuilder, value: ir.Value, tensor: TensorSpec) -> list[Piece]:
        """Bits of ``bfloat16(x)``."""

        def integer(number: int) -> ir.Value:
            return builder.number(number, _I32)

        one = builder.number(1.0, _F32)
        size = builder.op("Abs", value)
        is_finite = builder.op("LessOrEqual", size, builder.number(_LARGEST, _F32))
        finite = builder.op("Where", is_finite, size, one)
        logarithm = builder.op(
            "Mul", builder.op("Log", finite), builder.number(1 / math.log(2.0), _F32)
        )
        exponent = builder.op(
            "Clip",
            builder.op("Floor", logarithm),
            builder.number(-126.0, _F32),
            builder.number(127.0, _F32),
        )
        place = builder.op(
            "Add", builder.op("Cast", exponent, to=_I32.value), integer(126)
        )  # 0 to 253
        powers = builder.array(2.0 ** np.arange(-126.0, 128.0), _F32)
        scaled = builder.op("Div", finite, builder.op("Gather", powers, place, axis=0))
        rounded = builder.op(
            "Round", builder.op("Mul", scaled, builder.number(128.0, _F32))
        )  # 128 to 256, or less for denormals
        bits = builder.op(
            "Add",
            builder.op("Mul", place, integer(128)),
            builder.op("Cast", rounded, to=_I32.value),
        )
        is_nan = builder.op("IsNaN", value)
        odd = builder.op("Where", is_nan, integer(0x7FC0), integer(0x7F80))
        bits = builder.op("Where", is_finite, bits, odd)
        is_negative = builder.op("Less", value, builder.number(0.0, _F32))
        sign = builder.op("Where", is_negative, integer(0x8000), integer(0))
        made = builder.op("Cast", builder.op("Add", bits, sign), to=ir.DataType.UINT16.value)
        return [Piece(suffix="bf16", value=made, dtype="U16", shape=tensor.shape)]

    def decode(
        self, builder: NodeBuilder, pieces: Sequence[ir.Value], tensor: TensorSpec
    ) -> ir.Value:
        """``a[code // 128] + b[code // 128] (code % 128)``, from tables of sign and exponent."""
        uppers = np.arange(512, dtype=np.uint32)  # sign and exponent
        starts = (uppers << 23).view(np.float32)
        is_finite = np.isfinite(starts)
        nexts = (uppers << 23 | 1 << 16).view(np.float32)
        widths = np.where(is_finite, nexts, 0) - np.where(is_finite, starts, 0)
        code = builder.op("Cast", pieces[0], to=_I32.value)
        upper = builder.op("Div", code, builder.number(128, _I32))
        lower = builder.op("Mod", code, builder.number(128, _I32))
        made = builder.op(
            "Add",
            builder.op("Gather", builder.array(starts, _F32), upper, axis=0),
            builder.op(
                "Mul",
                builder.op("Gather", builder.array(widths, _F32), upper, axis=0),
                builder.op("Cast", lower, to=_F32.value),
            ),
        )
        unsigned = builder.op("Mod", code, builder.number(0x8000, _I32))
        is_nan = builder.op("Greater", unsigned, builder.number(0x7F80, _I32))
        return builder.op("Where", is_nan, builder.number(math.nan, _F32), made)


class ChannelInt8:
    """Sends ``round(x / s)``, and for each channel its scale ``s = max|x| / 127``.

    The channels are on axis 1; their scales are of this step.  Zero stays zero.  Scales have a
    first dimension of 1, since a free first dimension would count as samples.
    """

    def refuse(self, tensor: TensorSpec) -> str:
        """Return why a tensor has no channels, or an empty string."""
        return refuse_rank(tensor)

    def encode(self, builder: NodeBuilder, value: ir.Value, tensor: TensorSpec) -> list[Piece]:
        """Codes from -127 to 127, and scales."""
        axes = [axis for axis in range(len(tensor.shape)) if axis != 1]
        scale = _find_scale(builder, value, axes, 127, keepdims=False)
        zeros = builder.op(
            "Expand", builder.number(0, ir.DataType.INT8), builder.op("Shape", scale)
        )
        codes = builder.op("QuantizeLinear", value, scale, zeros, axis=1)
        sent = builder.op("Add", scale, poison(builder, value, axes))
        sent = builder.op("Unsqueeze", sent, builder.integers([0]))
        return [
            Piece(suffix="int8", value=codes, dtype="I8", shape=tensor.shape),
            Piece(suffix="scale", value=sent, dtype="F32", shape=(1, *tensor.shape[1:2])),
        ]

    def decode(
        self, builder: NodeBuilder, pieces: Sequence[ir.Value], tensor: TensorSpec
    ) -> ir.Value:
        """``s code``."""
        codes, scale = pieces
        scale = builder.op("Squeeze", scale, builder.integers([0]))
        return builder.op("DequantizeLinear", codes, scale, axis=1)


class BlockInt4:
    """Sends ``round(x / s)`` in four bits each, and for each block its scale ``s = max|x| / 7``.

    A block is 64 consecutive elements of one sample; the last is filled up with zeros.  A byte
    holds element ``2 i`` in its lower half and element ``2 i + 1`` in its upper half, each plus 8.
    """

    def refuse(self, tensor: TensorSpec) -> str:
        """Return why a tensor has no blocks, or an empty string."""
        return refuse_rows(tensor, 16)

    def encode(self, builder: NodeBuilder, value: ir.Value, tensor: TensorSpec) -> list[Piece]:
        """Bytes of two codes each, from 1 to 15, and scales."""
        width = count_row(tensor)
        block = min(BLOCK, width + width % 2)
        blocks = -(-width // block)
        rows = builder.op("Reshape", value, builder.integers([-1, width]))
        missing = blocks * block - width
        if missing:
            rows = builder.op("Pad", rows, builder.integers([0, 0, 0, missing]))
        split = builder.op("Reshape", rows, builder.integers([-1, blocks, block]))
        scale = _find_scale(builder, split, [2], 7, keepdims=True)  # (N, blocks, 1)
        codes = builder.op("Round", builder.op("Div", split, scale))
        pairs = builder.op(
            "Reshape", codes, builder.integers([-1, blocks * block // 2, 2])
        )  # (N, bytes, 2)
        weights = builder.array(np.array([1.0, 16.0]), _F32)
        joined = builder.op(
            "ReduceSum", builder.op("Mul", pairs, weights), builder.integers([2]), keepdims=0
        )
        packed = builder.op("Add", joined, builder.number(8 * 17.0, _F32))
        made = builder.op("Cast", packed, to=ir.DataType.UINT8.value)
        sent = builder.op("Add", scale, poison(builder, split, [2], keepdims=True))
        sent = builder.op("Reshape", sent, builder.integers([-1, blocks]))
        rows_dim = tensor.shape[0]
        return [
            Piece(suffix="int4", value=made, dtype="U8", shape=(rows_dim, blocks * block // 2)),
            Piece(suffix="scale", value=sent, dtype="F32", shape=(rows_dim, blocks)),
        ]

    def decode(
        self, builder: NodeBuilder, pieces: Sequence[ir.Value], tensor: TensorSpec
    ) -> ir.Value:
        """``s (code - 8)``."""
        width = count_row(tensor)
        block = min(BLOCK, width + width % 2)
        blocks = -(-width // block)
        packed, scale = pieces
        code = builder.op("Cast", packed, to=_I32.value)  # (N, bytes)
        sixteen = builder.number(16, _I32)
        last = builder.integers([2])
        halves = builder.op(
            "Concat",
            builder.op("Unsqueeze", builder.op("Mod", code, sixteen), last),
            builder.op("Unsqueeze", builder.op("Div", code, sixteen), last),
            axis=2,
        )  # (N, bytes, 2)
        shifted = builder.op(
            "Sub", builder.op("Cast", halves, to=_F32.value), builder.number(8.0, _F32)
        )
        split = builder.op("Reshape", shifted, builder.integers([-1, blocks, block]))
        scaled = builder.op("Mul", split, builder.op("Unsqueeze", scale, last))
        rows = builder.op("Reshape", scaled, builder.integers([-1, blocks * block]))
        if blocks * block > width:
            rows = builder.op(
                "Slice",
                rows,
                builder.integers([0]),
                builder.integers([width]),
                builder.integers([1]),
            )
        return restore_shape(builder, rows, tensor)


def _find_scale(
    builder: NodeBuilder, value: ir.Value, axes: Sequence[int], steps: int, *, keepdims: bool
) -> ir.Value:
    """Build ``max|x| / steps`` along ``axes``, so that ``steps`` times it is finite and not 0.

    Rounding up could make ``steps`` times the largest float infinite.
    """
    peak = builder.op(
        "ReduceMax", builder.op("Abs", value), builder.integers(axes), keepdims=int(keepdims)
    )
    largest = np.nextafter(np.float32(_LARGEST / steps), np.float32(0))
    return builder.op(
        "Clip",
        builder.op("Div", peak, builder.number(float(steps), _F32)),
        builder.number(TINIEST, _F32),
        builder.number(float(largest), _F32),
    )
