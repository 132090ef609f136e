"""What every codec has in common: the tensors that it sends, and the shapes that it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.tensors import TensorSpec

TINIEST = 2.0**-126
"""The smallest scale; smaller numbers are denormal, and some processors take them for zero."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One of the tensors that are sent in place of an encoded one.

    ``suffix`` is the end of its name, and ``bounds`` the half-open range of its integers.
    """

    suffix: str
    value: ir.Value
    dtype: str
    shape: tuple[int | str | None, ...]
    bounds: tuple[int, int] | None = None


class Encoding(Protocol):
    """A codec's nodes.

    ``decode`` gets the values of the pieces in the order in which ``encode`` returned them.
    """

    def refuse(self, tensor: TensorSpec) -> str:
        """Return why a tensor cannot be encoded, or an empty string."""

    def encode(self, builder: NodeBuilder, value: ir.Value, tensor: TensorSpec) -> list[Piece]:
        """Build the pieces of ``value``, which is a float32 tensor declared as ``tensor``."""

    def decode(
        self, builder: NodeBuilder, pieces: Sequence[ir.Value], tensor: TensorSpec
    ) -> ir.Value:
        """Build the float32 tensor that the pieces encode."""


def refuse_rank(tensor: TensorSpec) -> str:
    """Return why a tensor has no channels, or an empty string."""
    if len(tensor.shape) < 2:
        return f"it has {len(tensor.shape)} dimensions, and the second holds the channels"
    return ""


def refuse_rows(tensor: TensorSpec, least: int) -> str:
    """Return why a tensor has no rows of a known number of elements, or an empty string.

    ``least`` is the smallest number of elements of a row that the codec makes smaller.
    """
    if len(tensor.shape) < 2:
        return f"it has {len(tensor.shape)} dimensions, and the first holds the samples"
    unknown = [str(dim) for dim in tensor.shape[1:] if not isinstance(dim, int)]
    if unknown:
        return (
            f"its size '{unknown[0]}' is not known beforehand; only the first may be free, so fix "
            "the other free sizes of the model's inputs with --dim"
        )
    width = count_row(tensor)
    return "" if width >= least else f"a sample has {width} elements, and it needs {least}"


def count_row(tensor: TensorSpec) -> int:
    """Return the number of elements of each sample, whose sizes are known."""
    return math.prod(dim for dim in tensor.shape[1:] if isinstance(dim, int))


def poison(
    builder: NodeBuilder, value: ir.Value, axes: Sequence[int], *, keepdims: bool = False
) -> ir.Value:
    """Build numbers that are 0, or NaN where the values along ``axes`` are not all finite.

    Rounding and clipping turn infinity into a number, and comparisons lose NaN, so codecs add these
    numbers to what they send: the receiver refuses them as it would refuse the tensor itself.
    """
    zeros = builder.op("Mul", value, builder.number(0.0, ir.DataType.FLOAT))
    return builder.op("ReduceSum", zeros, builder.integers(axes), keepdims=int(keepdims))


def restore_shape(builder: NodeBuilder, rows: ir.Value, tensor: TensorSpec) -> ir.Value:
    """Build a tensor of the declared shape from rows of its samples, ``(N, elements)``."""
    sizes = [dim for dim in tensor.shape[1:] if isinstance(dim, int)]
    return builder.op("Reshape", rows, builder.integers([-1, *sizes]))
