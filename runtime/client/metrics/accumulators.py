"""Accumulators of metrics: add blocks of scores and labels, then compute the number.

Formulas and names are those of ``sklearn.metrics``.  All but :class:`RankedScores` need the same
memory for any number of blocks.  This module knows neither models nor names of outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from splitonnx.runtime.client.metrics.labelled_scores import LabelledScores

_NOTHING = "no label counts: all are ignored, or weigh 0"
_MOST_NAMED = 5
_LARGEST_EXPONENT = 709.0
_SMALLEST_PROBABILITY = 1e-30
"""As in the loss of a model that ends in probabilities."""


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """A metric's number; if the data do not define it, it is NaN, and ``reason`` says why."""

    value: float
    reason: str = ""


class Accumulator(ABC):
    """Adds up what a metric needs of each block."""

    @abstractmethod
    def add(self, block: LabelledScores) -> None:
        """Add a block."""

    @abstractmethod
    def compute(self) -> MetricValue:
        """Return the metric of all blocks."""


class WeightedMean(Accumulator):
    """The base class of metrics that are means over labels, each weighted as its sample."""

    def __init__(self) -> None:
        self._total = self._weight = 0.0

    def add(self, block: LabelledScores) -> None:
        """Add the terms of a block."""
        terms, counts = self.compute_terms(block), block.weights != 0
        self._total += float(block.weights[counts] @ terms[counts])  # 0 times infinity is NaN
        self._weight += float(block.weights.sum())

    @abstractmethod
    def compute_terms(self, block: LabelledScores) -> np.ndarray:
        """Return one number for each row."""

    def compute(self) -> MetricValue:
        """Return the mean."""
        return _divide(self._total, self._weight)


class Accuracy(WeightedMean):
    """``accuracy_score`` of classes; of answers yes or no, that of all answers taken together.

    Scores above ``threshold`` mean yes.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self._threshold = threshold

    def compute_terms(self, block: LabelledScores) -> np.ndarray:
        """Return 1 for each label that is predicted, or the part of a row's labels."""
        if block.labels.ndim == 1:
            return np.asarray(_guess(block.scores) == block.labels, np.float64)
        matches = (block.scores > self._threshold) == (block.labels > 0.5)
        return np.asarray(matches.mean(axis=1))


class TopK(WeightedMean):
    """``top_k_accuracy_score``; of equal scores, the one with the higher index comes first."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self._k = k

    def compute_terms(self, block: LabelledScores) -> np.ndarray:
        """Return 1 for each label among the classes with the highest scores."""
        index = block.labels[:, None]
        own = np.take_along_axis(block.scores, index, axis=1)
        after = np.arange(block.scores.shape[1]) > index
        ahead = (block.scores > own) | ((block.scores == own) & after)
        return np.asarray(ahead.sum(axis=1) < self._k, np.float64)


class Perplexity(WeightedMean):
    """The exponential of ``log_loss``: of the mean negative log-probability of the labels."""

    def __init__(self, *, are_probabilities: bool) -> None:
        super().__init__()
        self._are_probabilities = are_probabilities

    def compute_terms(self, block: LabelledScores) -> np.ndarray:
        """Return each label's negative log-probability."""
        scores = block.scores
        if self._are_probabilities:
            scores = np.log(np.maximum(scores, _SMALLEST_PROBABILITY))
        shifted = _shift(scores)
        own = np.take_along_axis(shifted, block.labels[:, None], axis=1)[:, 0]
        return np.asarray(np.log(np.exp(shifted).sum(axis=1)) - own)

    def compute(self) -> MetricValue:
        """Return the exponential of the mean."""
        mean = super().compute()
        if mean.reason:
            return mean
        value = math.inf if mean.value > _LARGEST_EXPONENT else math.exp(mean.value)
        return MetricValue(value=value)


class Deviation(Accumulator):
    """``mean_absolute_error``, ``mean_squared_error`` or ``root_mean_squared_error``.

    The result is the mean of the columns' results.
    """

    def __init__(self, kind: str, columns: int) -> None:
        self._kind = kind
        self._totals = np.zeros(columns)
        self._weight = 0.0

    def add(self, block: LabelledScores) -> None:
        """Add the differences of a block."""
        difference = np.abs(block.scores - block.labels)
        terms = difference if self._kind == "mae" else difference**2
        self._totals += block.weights @ terms
        self._weight += float(block.weights.sum())

    def compute(self) -> MetricValue:
        """Return the mean over all columns."""
        if not self._weight > 0:
            return MetricValue(value=math.nan, reason=_NOTHING)
        means = self._totals / self._weight
        return MetricValue(value=float(np.mean(np.sqrt(means) if self._kind == "rmse" else means)))


class Confusion(Accumulator):
    """``f1_score``, ``precision_score`` or ``recall_score``, which are 0 where they divide by 0.

    ``size`` is the number of classes, or that of columns.  One column is two classes, no and yes.
    Without ``average``, the result is that of class 1 of two, otherwise the mean over all classes
    that occur, or over all columns.  In a column, scores above ``threshold`` mean yes.
    """

    def __init__(
        self, kind: str, size: int, average: str, *, has_classes: bool, threshold: float = 0.0
    ) -> None:
        self._kind, self._threshold = kind, threshold
        self._has_columns = not has_classes and size > 1
        count = max(2, size)
        is_binary = not self._has_columns and count == 2
        self._average = average or ("binary" if is_binary else "macro")
        self._hits, self._guessed, self._true = (np.zeros(count) for _ in range(3))
        self._occurs = np.full(count, self._has_columns)
        self._weight = 0.0

    def add(self, block: LabelledScores) -> None:
        """Count the labels, the guesses, and where they agree."""
        self._weight += float(block.weights.sum())
        if self._has_columns:
            guess, truth = block.scores > self._threshold, block.labels > 0.5
            self._hits += block.weights @ (guess & truth)
            self._guessed += block.weights @ guess
            self._true += block.weights @ truth
            return
        if block.labels.ndim == 1:
            classes, truths = _guess(block.scores), block.labels
        else:
            classes = (block.scores[:, 0] > self._threshold).astype(np.int64)
            truths = (block.labels[:, 0] > 0.5).astype(np.int64)
        is_hit = classes == truths
        self._hits += self._count(truths[is_hit], block.weights[is_hit])
        self._guessed += self._count(classes, block.weights)
        self._true += self._count(truths, block.weights)
        self._occurs[classes] = self._occurs[truths] = True

    def _count(self, classes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.bincount(classes, weights, minlength=len(self._hits))

    def compute(self) -> MetricValue:
        """Return the average over the classes or columns."""
        if not self._weight > 0:
            return MetricValue(value=math.nan, reason=_NOTHING)
        hits, guessed, true = self._hits, self._guessed, self._true
        if self._average == "micro":
            hits, guessed, true = (np.array([part.sum()]) for part in (hits, guessed, true))
        below = {"precision": guessed, "recall": true, "f1": (guessed + true) / 2}[self._kind]
        values = np.divide(hits, below, out=np.zeros_like(hits), where=below > 0)
        if self._average == "binary":
            return MetricValue(value=float(values[1]))
        if self._average == "weighted":
            total = float(true.sum())
            return MetricValue(value=float(values @ true) / total if total else 0.0)
        kept = values if self._average == "micro" else values[self._occurs]
        return MetricValue(value=float(np.mean(kept)))


class RankedScores(Accumulator):
    """``roc_auc_score``: of class 1 of two, otherwise the mean over all classes or columns.

    Each class is compared with all others (``multi_class="ovr"``, ``average="macro"``).  All scores
    of the data are kept: 8 bytes for each score and weight.  ``size`` is the number of classes, or
    that of columns.
    """

    def __init__(self, size: int, *, has_classes: bool, are_probabilities: bool) -> None:
        self._size = size
        self._has_classes = has_classes
        self._are_probabilities = are_probabilities
        self._blocks: list[LabelledScores] = []

    def add(self, block: LabelledScores) -> None:
        """Keep the scores of what counts in a block."""
        counts = block.weights != 0
        scores, labels = block.scores[counts], block.labels[counts]
        if self._has_classes and self._size == 2:
            scores = scores[:, 1:] if self._are_probabilities else scores[:, 1:] - scores[:, :1]
        elif self._has_classes and not self._are_probabilities:
            odds = np.exp(_shift(scores))
            scores = odds / odds.sum(axis=1, keepdims=True)
        kept = LabelledScores(scores=scores, labels=labels, weights=block.weights[counts])
        self._blocks.append(kept)

    def compute(self) -> MetricValue:
        """Return the area under the curve; it needs labels of both kinds."""
        if not any(len(block.scores) for block in self._blocks):
            return MetricValue(value=math.nan, reason=_NOTHING)
        labels = np.concatenate([block.labels for block in self._blocks])
        weights = np.concatenate([block.weights for block in self._blocks])
        if self._has_classes and (labels == labels[0]).all():
            reason = f"all labels are of class {labels[0]}"
            return MetricValue(value=math.nan, reason=reason)
        areas, undefined = [], []
        for column in range(self._blocks[0].scores.shape[1]):
            scores = np.concatenate([block.scores[:, column] for block in self._blocks])
            is_true = self._find_true(labels, column)
            if is_true.all() or not is_true.any():
                undefined.append(self._describe(column, has_all=bool(is_true.all())))
            elif np.isnan(scores).any():
                return MetricValue(value=math.nan, reason="scores are infinite")
            else:
                areas.append(_compute_area(scores, is_true, weights))
        if undefined:
            more = len(undefined) - _MOST_NAMED
            named = [*undefined[:_MOST_NAMED], *([f"{more} more"] if more > 0 else [])]
            return MetricValue(value=math.nan, reason="; ".join(named))
        return MetricValue(value=float(np.mean(areas)))

    def _find_true(self, labels: np.ndarray, column: int) -> np.ndarray:
        if self._has_classes:
            return np.asarray(labels == (1 if self._size == 2 else column))
        return np.asarray(labels[:, column] > 0.5)

    def _describe(self, column: int, *, has_all: bool) -> str:
        if self._has_classes:
            return f"no label is of class {column}"
        where = "" if self._size == 1 else f" in column {column}"
        return f"all labels{where} are {int(has_all)}"


def _guess(scores: np.ndarray) -> np.ndarray:
    return np.asarray(np.argmax(scores, axis=1))


def _shift(scores: np.ndarray) -> np.ndarray:
    """Subtract each row's largest score, so that no exponential overflows."""
    with np.errstate(invalid="ignore"):  # infinity less infinity, which is reported as NaN
        return np.asarray(scores - scores.max(axis=1, keepdims=True))


def _divide(total: float, weight: float) -> MetricValue:
    if not weight > 0:
        return MetricValue(value=math.nan, reason=_NOTHING)
    return MetricValue(value=total / weight)


def _compute_area(scores: np.ndarray, is_true: np.ndarray, weights: np.ndarray) -> float:
    """Return the probability that a true one has a higher score than a false one; equal is half."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))
    true = np.add.reduceat(np.where(is_true, weights, 0.0)[order], starts)
    false = np.add.reduceat(np.where(is_true, 0.0, weights)[order], starts)
    below = np.cumsum(false) - false / 2
    return float(true @ below / (true.sum() * false.sum()))
