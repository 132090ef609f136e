"""Compute an elementwise formula tile by tile, so that intermediate values stay in the cache.

The formula of an optimizer such as Adam has some fifteen operators.  Over a whole tensor of many
megabytes, each of them reads its operands from memory and writes its result there.  A Scan over
tiles has them in the processor's cache, and takes half the time.  The results have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import onnx_ir as ir

from splitonnx.partitioner.graphs.bodies import build_scan
from splitonnx.partitioner.graphs.builders import NodeBuilder

LARGEST, SMALLEST = 65536, 8192
"""Elements of a tile: so many that they fit the cache, and that starting each does not matter."""

Formula = Callable[[NodeBuilder, Sequence[ir.Value]], Sequence[ir.Value]]
"""Appends nodes to a builder that compute results from operands; all have the same shape."""


@lru_cache(maxsize=1 << 10)
def choose_tile(shape: Sequence[int | str | None]) -> int | None:
    """Return the number of elements of a tile of a tensor, or ``None`` if it is not to be tiled.

    All tiles have the same size, which must therefore divide the tensor's size.
    """
    size = math.prod(dim if isinstance(dim, int) else 0 for dim in shape)
    if size <= 2 * LARGEST:
        return None
    return next((tile for tile in range(LARGEST, SMALLEST - 1, -1) if size % tile == 0), None)


def compute_in_tiles(
    builder: NodeBuilder, operands: Sequence[ir.Value], tile: int, formula: Formula
) -> Sequence[ir.Value]:
    """Return the results of a formula, computed by a Scan over tiles of the operands.

    The formula must treat all elements alike, and may read other values of the graph if these are
    scalars.  ``operands`` have the same type and a known shape, which divides into tiles of
    ``tile`` elements.
    """
    first = operands[0]
    assert first.shape is not None
    shape = [size for size in first.shape if isinstance(size, int)]
    prefix = f"{first.name}/tile"
    parts = [
        ir.Value(name=f"{prefix}/operand_{index}", type=first.type, shape=ir.Shape([tile]))
        for index in range(len(operands))
    ]
    inner = NodeBuilder(prefix)
    results = formula(inner, parts)
    for result in results:
        result.type, result.shape = first.type, ir.Shape([tile])
    body = ir.Graph(parts, list(results), nodes=inner.nodes, name=prefix)
    rows = [builder.op("Reshape", value, builder.integers([-1, tile])) for value in operands]
    return [
        builder.op("Reshape", stacked, builder.integers(shape))
        for stacked in build_scan(builder, body, [], rows)
    ]
