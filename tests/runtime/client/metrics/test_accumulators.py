"""Accumulators on small tables; the numbers are those of scikit-learn 1.9.1."""

from __future__ import annotations

import math

import numpy as np
import pytest

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
from splitonnx.runtime.client.metrics.labelled_scores import LabelledScores

SCORES = [[2, 1, 0], [0, 1, 0], [1, 1, 3], [0, 2, 2], [3, 0, 1]]
LABELS = [0, 2, 2, 1, 1]
WEIGHTS = [1, 2, 0.5, 1, 3]


def measure(
    accumulator: Accumulator,
    scores: object = SCORES,
    labels: object = LABELS,
    weights: object = WEIGHTS,
) -> MetricValue:
    block = LabelledScores(
        scores=np.array(scores, np.float64), labels=np.array(labels), weights=np.array(weights)
    )
    accumulator.add(block)
    return accumulator.compute()


@pytest.mark.parametrize(
    ("accumulator", "expected"),
    [
        (Accuracy(), 1 / 3),
        (TopK(2), 0.6),
        (Perplexity(are_probabilities=False), 6.379718),
        (Confusion("f1", 3, "", has_classes=True), 0.339683),
        (Confusion("f1", 3, "weighted", has_classes=True), 0.316825),
        (Confusion("recall", 3, "", has_classes=True), 0.483333),
        (Confusion("precision", 3, "micro", has_classes=True), 1 / 3),
        (RankedScores(3, has_classes=True, are_probabilities=False), 0.495201),
    ],
)
def test_classes_with_weights(accumulator: Accumulator, expected: float) -> None:
    assert measure(accumulator).value == pytest.approx(expected, abs=2e-6)


def test_a_class_that_occurs_with_weight_0_only_counts_in_the_mean_over_classes() -> None:
    accumulator = Confusion("f1", 4, "", has_classes=True)
    scores, labels = [[1, 0, 0, 0], [0, 0, 0, 1]], [0, 3]
    assert measure(accumulator, scores, labels, [1, 0]).value == 0.5


def test_where_f1_divides_by_0_it_is_0() -> None:
    accumulator = Confusion("f1", 1, "", has_classes=False)
    assert measure(accumulator, [[-1], [-2]], [[0], [0]], [1, 1]) == MetricValue(value=0.0)
    columns = Confusion("precision", 2, "weighted", has_classes=False)
    assert measure(columns, [[-1, 1]], [[0, 0]], [1]) == MetricValue(value=0.0)


def test_equal_scores_count_half_in_the_area() -> None:
    accumulator = RankedScores(1, has_classes=False, are_probabilities=False)
    scores, labels = [[1], [1], [2], [0]], [[1], [0], [1], [0]]
    assert measure(accumulator, scores, labels, [1, 1, 1, 1]).value == 0.875


@pytest.mark.parametrize(
    ("accumulator", "scores", "labels", "reason"),
    [
        (
            RankedScores(2, has_classes=True, are_probabilities=False),
            [[0, 1], [1, 0]],
            [1, 1],
            "all labels are of class 1",
        ),
        (
            RankedScores(3, has_classes=True, are_probabilities=False),
            [[0, 1, 0], [1, 0, 0]],
            [1, 2],
            "no label is of class 0",
        ),
        (
            RankedScores(9, has_classes=True, are_probabilities=True),
            np.eye(9)[:2],
            [0, 1],
            "no label is of class 2; no label is of class 3; no label is of class 4; no label is "
            "of class 5; no label is of class 6; 2 more",
        ),
        (
            RankedScores(2, has_classes=False, are_probabilities=False),
            [[1, 0], [0, 1]],
            [[0, 1], [1, 1]],
            "all labels in column 1 are 1",
        ),
        (
            RankedScores(1, has_classes=False, are_probabilities=False),
            [[1], [0]],
            [[0], [0]],
            "all labels are 0",
        ),
    ],
)
def test_an_area_needs_labels_of_both_kinds(
    accumulator: RankedScores, scores: object, labels: object, reason: str
) -> None:
    result = measure(accumulator, scores, labels, [1, 1])
    assert math.isnan(result.value)
    assert result.reason == reason


def test_a_label_that_a_model_excludes_makes_the_perplexity_infinite() -> None:
    excluded = [[0, -math.inf], [0, 0]]
    accumulator = Perplexity(are_probabilities=False)
    assert measure(accumulator, excluded, [1, 0], [0, 1]).value == pytest.approx(2)
    assert measure(accumulator, excluded, [1, 0], [1, 1]).value == math.inf
    assert measure(Perplexity(are_probabilities=False), [[0, 2000]], [0], [1]).value == math.inf


def test_the_perplexity_of_probabilities_is_that_of_the_loss() -> None:
    result = measure(Perplexity(are_probabilities=True), [[0.5, 0.5], [1, 0]], [0, 1], [1, 1])
    assert result.value == pytest.approx(math.sqrt(2 * 1e30))


def test_scores_of_infinity_have_no_probabilities() -> None:
    accumulator = RankedScores(3, has_classes=True, are_probabilities=False)
    result = measure(accumulator, [[math.inf, 0, 0], [0, 1, 0], [0, 0, 1]], [0, 1, 2], [1, 1, 1])
    assert math.isnan(result.value)
    assert result.reason == "scores are infinite"


def test_the_root_is_taken_of_each_column() -> None:
    scores, labels, weights = [[1, 0], [3, 5]], [[0, 0], [0, 0]], [3, 1]
    assert measure(Deviation("mae", 2), scores, labels, weights).value == 1.375
    assert measure(Deviation("mse", 2), scores, labels, weights).value == 4.625
    expected = (math.sqrt(3) + 2.5) / 2
    assert measure(Deviation("rmse", 2), scores, labels, weights).value == pytest.approx(expected)
    assert measure(Deviation("rmse", 2), scores, labels, [0, 0]).reason.startswith("no label")
