"""Combine the means of batches into the means of a dataset.

A result ``r`` of a batch is a mean.  The result ``r@counted`` says how much it weighs: what
counted, such as the labels that are not ignored, multiplied by their weights.  Without it, the mean
weighs as much as the batch has labels.  The result ``r@total`` is the sum that the batch adds;
without it, the sum is the mean multiplied by what counted.  If several losses are added up,
``loss.a@weight`` is the factor of ``loss.a``, and the loss of the dataset is the sum of the losses'
means.  This module does not know how batches are evaluated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from splitonnx.names import COUNTED, LOSS, TOTAL, WEIGHT


class DatasetMeans:
    """The means of all results over the batches that were added so far."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = defaultdict(float)
        self._counted: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = {}

    def add(self, results: Mapping[str, float], size: int) -> None:
        """Add the results of a batch with ``size`` labels."""
        for name, value in results.items():
            if name.endswith(WEIGHT):
                self._weights[name.removesuffix(WEIGHT)] = value
            elif not name.endswith((COUNTED, TOTAL)):
                counted = results.get(f"{name}{COUNTED}", size)
                self._totals[name] += results.get(f"{name}{TOTAL}", value * counted)
                self._counted[name] += counted

    def compute(self) -> dict[str, float]:
        """Return the mean of each result; it is 0 if nothing counted."""
        means = {
            name: total / self._counted[name] if self._counted[name] else 0.0
            for name, total in self._totals.items()
        }
        if self._weights:
            means[LOSS] = sum(weight * means[name] for name, weight in self._weights.items())
        return means
