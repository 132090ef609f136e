"""Codecs that send some numbers of each sample, with their places, and leave out the others.

The receiver takes those left out for zeros.  Which are sent is decided for each sample alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.cutting.transforms.encodings import (
    Piece,
    count_row,
    poison,
    refuse_rows,
    restore_shape,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.random_numbers import draw_words
from splitonnx.tensors import TensorSpec

_F32, _I64 = ir.DataType.FLOAT, ir.DataType.INT64
DRAWN = 0.1
"""The part of the numbers kept by ``randtopk`` that is drawn among those that are not largest."""


class TopK:
    """Sends the numbers with the largest absolute values, and their places, of each sample.

    Places are 16-bit integers where a sample has at most 65536 elements, else 32-bit.
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def refuse(self, tensor: TensorSpec) -> str:
        """Return why a tensor has no rows to choose from, or an empty string."""
        return refuse_rows(tensor, 2) or self._refuse_few(tensor)

    def _refuse_few(self, tensor: TensorSpec) -> str:
        width = count_row(tensor)
        is_smaller = self._count(width) * (4 + _choose_places(width)[1]) < 4 * width
        return (
            ""
            if is_smaller
            else f"{self._count(width)} of {width} elements of a sample with their places take no "
            "less than all of them; keep a smaller part"
        )

    def _count(self, width: int) -> int:
        return max(1, math.ceil(round(self._fraction * width, 6)))

    def encode(self, builder: NodeBuilder, value: ir.Value, tensor: TensorSpec) -> list[Piece]:
        """Values and their places in the sample."""
        width = count_row(tensor)
        rows = builder.op("Reshape", value, builder.integers([-1, width]))
        places = self._choose(builder, builder.op("Abs", rows), self._count(width))
        chosen = builder.op("GatherElements", rows, places, axis=1)
        chosen = builder.op("Add", chosen, poison(builder, rows, [1], keepdims=True))
        dtype, _ = _choose_places(width)
        kind = ir.DataType.UINT16 if dtype == "U16" else ir.DataType.INT32
        sent = builder.op("Cast", places, to=kind.value)
        shape = (tensor.shape[0], self._count(width))
        return [
            Piece(suffix="values", value=chosen, dtype="F32", shape=shape),
            Piece(suffix="places", value=sent, dtype=dtype, shape=shape, bounds=(0, width)),
        ]

    def _choose(self, builder: NodeBuilder, sizes: ir.Value, count: int) -> ir.Value:
        return _find_largest(builder, sizes, count)

    def decode(
        self, builder: NodeBuilder, pieces: Sequence[ir.Value], tensor: TensorSpec
    ) -> ir.Value:
        """Zeros, with the values in their places; places beyond the end count as the last."""
        values, sent = pieces
        width = count_row(tensor)
        last = builder.integer(width - 1)
        places = builder.op("Cast", sent, to=_I64.value)
        places = builder.op("Max", builder.op("Min", places, last), builder.integer(0))
        count = builder.op("Shape", values, start=0, end=1)
        shape = builder.op("Concat", count, builder.integers([width]), axis=0)
        zeros = builder.op("Expand", builder.number(0.0, _F32), shape)
        rows = builder.op("ScatterElements", zeros, places, values, axis=1)
        return restore_shape(builder, rows, tensor)


class RandomTopK(TopK):
    """Does as ``topk``, but a tenth of what is kept is drawn among the other numbers of a sample.

    So every number is sent now and then, which helps training.  Random numbers depend only on the
    seed, the step, the micro-batch and the tensor, so a step can be repeated exactly.  ``key`` is
    the value of :data:`splitonnx.manifests.KEY` in the graph, which the caller adds to it.
    """

    def __init__(self, fraction: float, key: ir.Value, name: str) -> None:
        super().__init__(fraction)
        self._key, self._name = key, name

    def _choose(self, builder: NodeBuilder, sizes: ir.Value, count: int) -> ir.Value:
        drawn = min(count - 1, math.ceil(DRAWN * count))
        if not drawn:
            return _find_largest(builder, sizes, count)
        first = _find_largest(builder, sizes, count - drawn)
        words = draw_words(builder, self._key, self._name, builder.op("Shape", sizes))
        steps = builder.op("Div", words, builder.integer(2**8))  # below 2**24, exact as a float
        chances = builder.op("Cast", steps, to=_F32.value)
        above = builder.op("Expand", builder.number(float(2**25), _F32), builder.op("Shape", first))
        ranked = builder.op("ScatterElements", chances, first, above, axis=1)
        return _find_largest(builder, ranked, count)


def _find_largest(builder: NodeBuilder, sizes: ir.Value, count: int) -> ir.Value:
    """Build the places of the ``count`` largest numbers of each row, ``(N, count)``."""
    _, places = builder.ops("TopK", [sizes, builder.integers([count])], 2, {"axis": 1, "sorted": 0})
    return places


def _choose_places(width: int) -> tuple[str, int]:
    """Return the element type of places in a row, and its size in bytes."""
    return ("U16", 2) if width <= np.iinfo(np.uint16).max + 1 else ("I32", 4)
