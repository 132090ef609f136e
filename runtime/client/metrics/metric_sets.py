"""The metrics of one evaluation, computed batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from splitonnx.manifests import ScoreKind
from splitonnx.names import SCORES
from splitonnx.runtime.client.metrics.accumulators import (
    Accumulator,
    Accuracy,
    Confusion,
    Deviation,
    MetricValue,
    Perplexity,
    RankedScores,
    TopK,
)
from splitonnx.runtime.client.metrics.choices import Metric
from splitonnx.runtime.client.metrics.labelled_scores import iter_blocks


class MetricSet:
    """The metrics over the batches that were added so far."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = {metric.name: metric for metric in metrics}
        self._accumulators = {metric.name: _start(metric) for metric in metrics}
        self._broken: dict[str, str] = {}

    def add(self, data: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Add a batch: its arrays, and the predictions for it."""
        for name, metric in self._metrics.items():
            for block in iter_blocks(metric, data, outputs):
                if np.isnan(block.scores).any():
                    output = metric.source.output.removeprefix(SCORES)
                    self._broken[name] = f"the output '{output}' contains NaN"
                elif len(block.scores):
                    self._accumulators[name].add(block)

    def compute(self) -> dict[str, MetricValue]:
        """Return each metric's number by its name."""
        return {name: self._compute(name) for name in self._metrics}

    def _compute(self, name: str) -> MetricValue:
        if reason := self._broken.get(name):
            return MetricValue(value=math.nan, reason=reason)
        result = self._accumulators[name].compute()
        if math.isnan(result.value) and not result.reason:
            return MetricValue(value=math.nan, reason="scores are infinite")
        return result


def _start(metric: Metric) -> Accumulator:
    source, size = metric.source, metric.size
    has_classes = source.kind is ScoreKind.CLASSES
    threshold = 0.5 if source.are_probabilities else 0.0
    match metric.kind:
        case "accuracy":
            return Accuracy(threshold)
        case "top":
            return TopK(metric.k)
        case "perplexity":
            return Perplexity(are_probabilities=source.are_probabilities)
        case "auc":
            return RankedScores(
                size, has_classes=has_classes, are_probabilities=source.are_probabilities
            )
        case "f1" | "precision" | "recall" as kind:
            return Confusion(
                kind, size, metric.average, has_classes=has_classes, threshold=threshold
            )
        case kind:
            return Deviation(kind, size)
