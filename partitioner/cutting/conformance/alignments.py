"""Stack the inputs of several pieces into a batch, and compare the results of pieces and batch.

A *piece* is one sample, or several samples if an export fixed the batch at more than one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from splitonnx.partitioner.cutting.conformance.measures import measure
from splitonnx.partitioner.cutting.conformance.samples import Arrays


def stack(pieces: Sequence[Arrays], axes: Mapping[str, int]) -> Arrays:
    """Join the inputs of several pieces along ``axes``, which maps an input to its batch axis.

    An input that has no batch axis is taken from the first piece.
    """
    joined = {
        name: np.concatenate([piece[name] for piece in pieces], axis) for name, axis in axes.items()
    }
    return {**pieces[0], **joined}


def measure_stacked(
    found: np.ndarray, pieces: Sequence[np.ndarray], rows: int, *, is_mean: bool = False
) -> float:
    """Return the relative difference between an output for a batch and the outputs for its pieces.

    ``found`` is the output for the batch, and ``rows`` is the number of samples in a piece.  The
    outputs for the pieces are joined along the first axis, and along each axis of size ``rows``.
    If a piece is one sample, its output may lack the batch axis.  A number without axes, such as a
    penalty, may also be the mean or the sum of the pieces' numbers.  If ``is_mean`` is true, this
    is allowed for any output with one element.  The smallest difference is returned; it is infinite
    if no shape fits.
    """
    candidates = [*_join_as_they_are(pieces, rows)]
    if rows == 1 and found.shape == (len(pieces), *pieces[0].shape):
        candidates.append(np.stack(pieces))
    if (is_mean or not found.ndim) and found.size == 1 and found.shape == pieces[0].shape:
        every = np.stack(pieces)
        candidates += [np.asarray(every.sum(axis=0)), np.asarray(every.mean(axis=0))]
    return min((measure(found, each) for each in candidates), default=np.inf)


def measure_somehow_stacked(
    found: np.ndarray, pieces: Sequence[np.ndarray], rows: int, *, is_mean: bool = False
) -> float:
    """Return the relative difference like :func:`measure_stacked`, for a tensor within a model.

    Within a model, the batch may also be merged with another axis, such as samples and time steps
    in one axis.  The first axis and each axis of size ``rows`` are tried, or all axes if no axis
    has this size.
    """
    shape = pieces[0].shape
    axes = [axis for axis, size in enumerate(shape) if size == rows or rows not in shape]
    return min(
        measure_merged(found, pieces, {0, *axes}),
        measure_stacked(found, pieces, rows, is_mean=is_mean),
    )


def measure_merged(found: np.ndarray, pieces: Sequence[np.ndarray], axes: Collection[int]) -> float:
    """Return the relative difference between a tensor and its pieces, joined inside one axis.

    The batch may be merged into any axis in ``axes``, at any position within this axis.  All these
    ways to merge the pieces are tried, and the smallest difference is returned.  It is infinite if
    the pieces cannot be merged to the tensor's shape.
    """
    return min((measure(found, each) for each in _merge(found, pieces, axes)), default=np.inf)


def _join_as_they_are(pieces: Sequence[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    first = pieces[0]
    if any(piece.ndim != first.ndim for piece in pieces):
        return
    for axis in range(first.ndim):
        if axis and first.shape[axis] != rows:
            continue
        if len({(*piece.shape[:axis], *piece.shape[axis + 1 :]) for piece in pieces}) == 1:
            yield np.concatenate(pieces, axis)


def _merge(
    found: np.ndarray, pieces: Sequence[np.ndarray], axes: Collection[int]
) -> Iterator[np.ndarray]:
    """Yield the pieces joined along each axis, in each order that splits the axis in two."""
    first = pieces[0]
    if any(piece.shape != first.shape for piece in pieces):
        return
    for axis, size in enumerate(first.shape):
        shape = (*first.shape[:axis], size * len(pieces), *first.shape[axis + 1 :])
        if axis not in axes or shape != found.shape:
            continue
        for before in (d for d in range(1, size + 1) if size % d == 0):
            parts = (*first.shape[:axis], before, size // before, *first.shape[axis + 1 :])
            yield np.stack([piece.reshape(parts) for piece in pieces], axis + 1).reshape(shape)
