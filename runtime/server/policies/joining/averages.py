"""Averages of the tensors of several clients, weighted by how many samples each trained with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

Contribution: TypeAlias = tuple[int, Mapping[str, np.ndarray]]
"""The number of samples that tensors were trained with, and the tensors by name."""


def average(contributions: Sequence[Contribution]) -> dict[str, np.ndarray]:
    """Return the weighted mean of each tensor, in the tensor's own dtype and shape.

    All contributions have the same tensors.  The weights are the numbers of samples; if all of them
    are 0, the contributions weigh alike.  The mean is computed in float64, so that equal tensors
    have exactly themselves as their mean.  The order of contributions does not change a bit,
    because they are added in an order that follows from what they contain.

    Source: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized
    Data (2017), algorithm 1.
    """
    contributions = sorted(contributions, key=_rank)
    counts = [samples for samples, _ in contributions]
    if not any(counts):
        counts = [1] * len(counts)
    first = contributions[0][1]
    return {
        name: _combine([tensors[name] for _, tensors in contributions], counts) for name in first
    }


def mix(
    base: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], weight: float
) -> dict[str, np.ndarray]:
    """Move each tensor of ``base`` towards that of ``other`` by a part ``weight`` of the way.

    ``weight`` is at least 0 and below 1.  It is computed in float64.  Tensors that ``other`` does
    not have are left out.
    """
    mixed = {}
    for name, array in other.items():
        start, end = base[name].astype(np.float64), array.astype(np.float64)
        value = (1 - weight) * start + weight * end
        mixed[name] = np.asarray(np.where(start == end, start, value), dtype=array.dtype)
    return mixed


def _rank(contribution: Contribution) -> tuple[int, bytes]:
    """Return a key that differs for contributions that do, however they are named."""
    samples, tensors = contribution
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).view(np.uint8).data)
    return samples, digest.digest()


def _combine(arrays: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
    """Add the mean difference to the first array, so that equal arrays lose no bit.

    Where a difference is beyond the range of float64, the weighted values are added.
    """
    total = sum(counts)
    base = arrays[0].astype(np.float64)
    differences, values = np.zeros_like(base), np.zeros_like(base)
    with np.errstate(over="ignore", invalid="ignore"):
        for array, count in zip(arrays, counts, strict=True):
            wide = array.astype(np.float64)
            differences += count * (wide - base)
            values += count / total * wide
        mean = base + differences / total
    return np.asarray(np.where(np.isfinite(mean), mean, values), dtype=arrays[0].dtype)
