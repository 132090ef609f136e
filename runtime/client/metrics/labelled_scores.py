"""Scores beside their labels and weights, as two tables, in blocks of limited size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from splitonnx.manifests import ScoreKind
from splitonnx.runtime.client.metrics.choices import Metric

BLOCK = 1 << 20
"""The largest number of scores in a block, which limits the memory for intermediate results."""


@dataclass(frozen=True, kw_only=True)
class LabelledScores:
    """The scores that count, with labels and weights.

    For classes, ``scores`` is (M, classes) and ``labels`` is (M,), class indices.  Otherwise both
    are (M, columns).  ``weights`` is (M,).  All but class indices are float64.
    """

    scores: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def iter_blocks(
    metric: Metric, data: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> Iterator[LabelledScores]:
    """Yield what a batch's metric is computed from, without the labels that are ignored.

    ``data`` holds the batch's arrays and ``outputs`` its predictions.
    """
    source = metric.source
    scores, labels = np.atleast_1d(outputs[source.output]), np.atleast_1d(data[source.labels])
    weights = np.ones(len(labels))
    if source.sample_weights is not None:
        weights = data[source.sample_weights].astype(np.float64)
    weights = np.broadcast_to(weights.reshape(-1, *[1] * (labels.ndim - 1)), labels.shape)
    if source.kind is ScoreKind.CLASSES:
        axis = source.class_axis
        scores = np.moveaxis(scores, 1 if axis is None else axis, -1)
        scores, labels = scores.reshape(-1, scores.shape[-1]), labels.reshape(-1)
        weights = weights.reshape(-1)
    else:
        scores, labels = scores.reshape(-1, metric.size), labels.reshape(-1, metric.size)
        weights = weights.reshape(-1, metric.size)[:, 0]
    rows = max(1, BLOCK // max(1, scores.shape[1]))
    for start in range(0, len(scores), rows):
        part = slice(start, start + rows)
        yield _take(source.ignore_index, scores[part], labels[part], weights[part])


def _take(
    ignored: int | None, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> LabelledScores:
    if ignored is not None:
        counts = labels != ignored
        scores, labels, weights = scores[counts], labels[counts], weights[counts]
    is_index = labels.dtype.kind == "i"
    return LabelledScores(
        scores=scores.astype(np.float64),
        labels=labels if is_index else labels.astype(np.float64),
        weights=weights,
    )
