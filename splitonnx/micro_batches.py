"""Steps that consist of several micro-batches: their names, their rows, and their weights.

The gradients of the micro-batches are added up and applied once, so a step needs the memory of one
micro-batch.  A micro-batch's *weight* is its part in the mean that the loss of the whole batch is:
the loss and its gradient are the sums of the micro-batches' own, each multiplied by its weight.
This module sees arrays and declarations; it neither runs nor sends anything.
``runtime/js/src/micro_batches.ts`` is the twin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import accumulate, pairwise
from operator import add

import numpy as np

from splitonnx.errors import UnusableData, UsageError
from splitonnx.manifests import PartyManifest
from splitonnx.names import ACCUMULATE, COUNTED, LOSS, UPDATE
from splitonnx.sample_axes import find_sample_axis
from splitonnx.tensors import TensorSpec

MICRO_BATCH_WEIGHT = "splitonnx.weight"
"""The name of an array of the client, F32[]: the weight of a micro-batch in its step."""
MICRO_BATCHES = "splitonnx.micro_batches"
"""The name of a wire, I64[]: the number of micro-batches that were accumulated."""
CONFIRMED = "splitonnx.confirmed"
"""The name of a wire, I64[]: the same number, when the server has all that it needs to update."""
MOST_IN_FLIGHT = 16
"""The largest number of tasks of one step that a server lets a client have open at once."""
LARGEST_DIFFERENCE = 1e-6
"""How much the weights that two losses give the same micro-batch may differ."""


def check_accumulating(manifest: PartyManifest) -> None:
    """Check that a step of a client's part can consist of several micro-batches.

    Raises:
        UsageError: the bundle was cut by an earlier version, or its loss cannot be weighed.
    """
    if manifest.unweighable:
        raise UsageError(f"this bundle cannot accumulate: {manifest.unweighable}")
    if not all(any(p.name == name for p in manifest.phases) for name in (ACCUMULATE, UPDATE)):
        raise UsageError(
            "this bundle cannot accumulate: it was cut by an earlier version; cut the model again "
            "with this version, or train without accumulate (--accumulate)"
        )


def enlarge(specs: Sequence[TensorSpec], count: int) -> tuple[TensorSpec, ...]:
    """Return declarations of the arrays of a step, of which a micro-batch has those of ``specs``.

    Only a number of rows that the model fixes differs: it is ``count`` times as large.
    """
    return tuple(_enlarge(spec, specs, count) for spec in specs) if count > 1 else tuple(specs)


def _enlarge(spec: TensorSpec, specs: Sequence[TensorSpec], count: int) -> TensorSpec:
    axis = None if _is_undivided(spec, specs) else find_sample_axis(spec, specs)
    shape = tuple(
        dim * count if index == axis and isinstance(dim, int) else dim
        for index, dim in enumerate(spec.shape)
    )
    return TensorSpec(name=spec.name, dtype=spec.dtype, shape=shape, bounds=spec.bounds)


def split_batch(
    batch: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], count: int
) -> list[dict[str, np.ndarray]]:
    """Divide a batch into at most ``count`` micro-batches, whose numbers of rows differ by 1.

    Each has at least one row, and the first ones are the larger.  An array that is one number for
    the whole batch is part of every micro-batch.

    Raises:
        UnusableData: the number of samples is not the same in all arrays, or an array has no axis
            of samples that could be divided.
    """
    axes = {s.name: _find_axis(s, specs) for s in specs if not _is_undivided(s, specs)}
    rows = {name: batch[name].shape[axis] for name, axis in axes.items()}
    if len(set(rows.values())) != 1:
        sizes = ", ".join(f"'{name}' {size}" for name, size in rows.items())
        raise UnusableData(
            "the data",
            "a batch is divided into micro-batches by its samples, and its arrays have different "
            f"numbers of them: {sizes or 'none'}; train without accumulate (--accumulate)",
        )
    size = next(iter(rows.values()))
    number = min(count, size)
    sizes_of_parts = [size // number + (index < size % number) for index in range(number)]
    return [
        {
            name: _slice(array, axes[name], start, end) if name in axes else array
            for name, array in batch.items()
        }
        for start, end in pairwise(accumulate(sizes_of_parts, initial=0))
    ]


def _is_undivided(spec: TensorSpec, specs: Sequence[TensorSpec]) -> bool:
    """Return whether an array is one number for the whole batch, and has no row for each sample."""
    if any(dim != 1 for dim in spec.shape):
        return False
    larger = [other.shape[0] for other in specs if any(dim != 1 for dim in other.shape)]
    return not spec.shape or any(rows != 1 for rows in larger)


def _find_axis(spec: TensorSpec, specs: Sequence[TensorSpec]) -> int:
    axis = find_sample_axis(spec, specs)
    if axis is None:
        raise UnusableData(
            "the data",
            f"'{spec.name}', {spec}, has no axis that counts the samples, so a batch of it cannot "
            "be divided into micro-batches; train without accumulate (--accumulate)",
        )
    return axis


def _slice(array: np.ndarray, axis: int, start: int, end: int) -> np.ndarray:
    return array[(*[slice(None)] * axis, slice(start, end))]


def find_weights(counts: Sequence[Mapping[str, float]]) -> list[float]:
    """Return the weight of each micro-batch of a step; they are all 0 if nothing counts.

    ``counts`` has the results of the phase ``weigh`` for each micro-batch.

    Raises:
        UnusableData: there are several losses, and they weigh a micro-batch differently.
    """
    found: dict[str, list[float]] = {}
    for name in counts[0]:
        if name.startswith(LOSS) and name.endswith(COUNTED):
            own = [count[name] for count in counts]
            total = reduce(add, own)  # in this order in each language, to the same bits
            found[name.removesuffix(COUNTED)] = [value / total if total else 0.0 for value in own]
    first, weights = next(iter(found.items()))
    for name, others in found.items():
        for number, (one, other) in enumerate(zip(weights, others, strict=True)):
            if abs(one - other) > LARGEST_DIFFERENCE:
                raise UnusableData(
                    "the data",
                    f"micro-batch {number + 1} of {len(counts)} counts {one:.6g} of the batch in "
                    f"'{first}', and {other:.6g} in '{name}'; gradients can be added up only if it "
                    "counts as much in each loss; train without accumulate (--accumulate)",
                )
    return weights
