"""Metrics over uneven batches against scikit-learn: kinds of outputs, weights, ignored labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from sklearn import metrics as reference

from splitonnx.manifests import ScoredOutput
from splitonnx.runtime.client.metrics.choices import choose_metrics
from splitonnx.runtime.client.metrics.metric_sets import MetricSet
from tests.support.scored_manifests import BINARY, CLASSES, VALUES, make_manifest

Score = Callable[[np.ndarray, np.ndarray, np.ndarray | None], float]
ROWS = (5, 1, 0, 8, 3)
"""Sizes of batches."""


def softmax(scores: np.ndarray) -> np.ndarray:
    odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=-1, keepdims=True))


def compute(
    names: list[str], source: ScoredOutput, data: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Compute metrics over batches of different sizes; ``data`` holds the output ``y``, too."""
    shape: tuple[int | str, ...] = ("N", *data["y"].shape[1:])
    chosen = MetricSet(choose_metrics(names, make_manifest(source, y=shape)))
    start = 0
    for rows in ROWS:
        batch = {name: array[start : start + rows] for name, array in data.items()}
        chosen.add(batch, {"y": batch.pop("y")})
        start += rows
    assert start == len(data["y"])
    return {name: value.value for name, value in chosen.compute().items()}


def average(score: Callable[..., float], kind: str) -> Score:
    return lambda y, s, w: score(y, s.argmax(1), average=kind, zero_division=0, sample_weight=w)


def top(k: int) -> Score:
    def score(y: np.ndarray, s: np.ndarray, w: np.ndarray | None) -> float:
        return float(
            reference.top_k_accuracy_score(y, s, k=k, labels=np.arange(s.shape[1]), sample_weight=w)
        )

    return score


def auc(y: np.ndarray, s: np.ndarray, w: np.ndarray | None) -> float:
    scores = softmax(s)[:, 1] if s.shape[1] == 2 else softmax(s)
    return float(reference.roc_auc_score(y, scores, multi_class="ovr", sample_weight=w))


def perplexity(y: np.ndarray, s: np.ndarray, w: np.ndarray | None) -> float:
    labels = np.arange(s.shape[1])
    return float(np.exp(reference.log_loss(y, softmax(s), labels=labels, sample_weight=w)))


OF_CLASSES: dict[str, Score] = {
    "accuracy": lambda y, s, w: float(reference.accuracy_score(y, s.argmax(1), sample_weight=w)),
    **{
        f"{kind}-{how}": average(score, how)
        for kind, score in (
            ("f1", reference.f1_score),
            ("precision", reference.precision_score),
            ("recall", reference.recall_score),
        )
        for how in ("macro", "micro", "weighted")
    },
    "auc": auc,
    "perplexity": perplexity,
}


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("are_probabilities", [False, True])
@pytest.mark.parametrize(
    ("classes", "axis", "rest"),
    [(2, 1, ()), (4, 1, ()), (4, 1, (3,)), (5, 2, (3,)), (3, 2, (2, 2))],
)
def test_metrics_of_classes_are_those_of_scikit_learn(
    classes: int,
    axis: int,
    rest: tuple[int, ...],
    are_probabilities: bool,
    ignores: bool,
    weighs: bool,
) -> None:
    rng = np.random.default_rng([classes, axis, len(rest), ignores, weighs])
    count = sum(ROWS)
    scores = np.round(2 * rng.normal(size=(count, *rest, classes)), 1)  # some are equal
    labels = rng.integers(0, classes, (count, *rest))
    weights = rng.choice([0, 0.5, 1, 3], count)
    labels[:classes].flat[:classes] = range(classes)
    weights[:classes] = 1
    if ignores:
        labels[classes:][rng.random(labels[classes:].shape) < 0.3] = -100
    shown = np.moveaxis(softmax(scores) if are_probabilities else scores, -1, axis)
    data = {"y": shown, "t": labels, **({"w": weights} if weighs else {})}
    source = ScoredOutput(
        output="y",
        labels="t",
        kind=CLASSES,
        class_axis=axis,
        ignore_index=-100 if ignores else None,
        sample_weights="w" if weighs else None,
        are_probabilities=are_probabilities,
    )
    counts = labels.reshape(-1) != -100
    y, s = labels.reshape(-1)[counts], scores.reshape(-1, classes)[counts]
    w = np.repeat(weights, math.prod(rest))[counts] if weighs else None
    expected_by = {**OF_CLASSES, **{f"top-{k}": top(k) for k in range(1, classes) if classes > 2}}
    for kind, score in (
        ("f1", reference.f1_score),
        ("precision", reference.precision_score),
        ("recall", reference.recall_score),
    ):
        expected_by[kind] = average(score, "binary" if classes == 2 else "macro")
    found = compute(list(expected_by), source, data)
    assert found == pytest.approx(
        {name: each(y, s, w) for name, each in expected_by.items()}, rel=1e-9
    )


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_metrics_of_one_question_are_those_of_scikit_learn(
    shape: tuple[int, ...], weighs: bool
) -> None:
    rng = np.random.default_rng([len(shape), weighs])
    count = sum(ROWS)
    scores = np.round(rng.normal(size=(count, *shape)), 1)
    labels = rng.integers(0, 2, (count, *shape)).astype(np.float32)
    labels[0], labels[1] = 0, 1
    weights = rng.choice([0, 0.5, 1, 3], count)
    weights[:2] = 1
    source = ScoredOutput(
        output="y", labels="t", kind=BINARY, sample_weights="w" if weighs else None
    )
    y, s = labels.reshape(-1), scores.reshape(-1)
    w = np.repeat(weights, math.prod(shape)) if weighs else None
    guess = (s > 0).astype(np.float32)
    expected = {
        "accuracy": reference.accuracy_score(y, guess, sample_weight=w),
        "f1": reference.f1_score(y, guess, sample_weight=w),
        "f1-macro": reference.f1_score(y, guess, average="macro", sample_weight=w),
        "f1-micro": reference.f1_score(y, guess, average="micro", sample_weight=w),
        "f1-weighted": reference.f1_score(y, guess, average="weighted", sample_weight=w),
        "precision": reference.precision_score(y, guess, sample_weight=w),
        "recall": reference.recall_score(y, guess, sample_weight=w),
        "auc": reference.roc_auc_score(y, s, sample_weight=w),
    }
    found = compute(list(expected), source, {"y": scores, "t": labels, "w": weights})
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("are_probabilities", [False, True])
def test_metrics_of_several_labels_are_those_of_indicator_matrices(
    are_probabilities: bool, weighs: bool
) -> None:
    rng = np.random.default_rng([7, weighs])
    count = sum(ROWS)
    scores = np.round(rng.normal(size=(count, 4)), 1)
    scores[:, 3] = -1  # never guessed
    if are_probabilities:
        scores = 1 / (1 + np.exp(-scores))
    labels = rng.integers(0, 2, (count, 4)).astype(np.float32)
    labels[0], labels[1] = 0, 1
    weights = rng.choice([0, 0.5, 1, 3], count)
    weights[:2] = 1
    source = ScoredOutput(
        output="y",
        labels="t",
        kind=BINARY,
        sample_weights="w" if weighs else None,
        are_probabilities=are_probabilities,
    )
    w = weights if weighs else None
    guess = (scores > (0.5 if are_probabilities else 0)).astype(int)
    truth = labels.astype(int)
    expected = {
        f"{kind}-{how}": score(truth, guess, average=how, zero_division=0, sample_weight=w)
        for kind, score in (
            ("f1", reference.f1_score),
            ("precision", reference.precision_score),
            ("recall", reference.recall_score),
        )
        for how in ("macro", "micro", "weighted")
    }
    expected["f1"] = expected["f1-macro"]
    expected["auc"] = reference.roc_auc_score(truth, scores, sample_weight=w)
    spread = None if w is None else np.repeat(w, 4)
    expected["accuracy"] = reference.accuracy_score(
        truth.reshape(-1), guess.reshape(-1), sample_weight=spread
    )
    found = compute(list(expected), source, {"y": scores, "t": labels, "w": weights})
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
def test_metrics_of_values_are_those_of_scikit_learn(shape: tuple[int, ...], weighs: bool) -> None:
    rng = np.random.default_rng([9, len(shape), weighs])
    count = sum(ROWS)
    scores, labels = rng.normal(size=(2, count, *shape)).astype(np.float32)
    weights = rng.choice([0, 0.5, 1, 3], count)
    source = ScoredOutput(
        output="y", labels="t", kind=VALUES, sample_weights="w" if weighs else None
    )
    y, s, w = labels, scores, weights if weighs else None
    if len(shape) > 1:
        y, s = y.reshape(-1), s.reshape(-1)
        w = None if w is None else np.repeat(w, math.prod(shape))
    expected = {
        "mae": reference.mean_absolute_error(y, s, sample_weight=w),
        "mse": reference.mean_squared_error(y, s, sample_weight=w),
        "rmse": reference.root_mean_squared_error(y, s, sample_weight=w),
    }
    found = compute(list(expected), source, {"y": scores, "t": labels, "w": weights})
    assert found == pytest.approx(expected, rel=1e-6)


def test_scores_that_are_not_numbers_make_the_metric_nan_and_say_so() -> None:
    source = ScoredOutput(output="y", labels="t", kind=CLASSES, class_axis=1, ignore_index=-1)
    names = ["f1", "perplexity"]
    chosen = MetricSet(choose_metrics(names, make_manifest(source, y=("N", 3))))
    scores = np.zeros((2, 3), np.float32)
    scores[1, 0] = np.nan
    chosen.add({"t": np.array([0, -1])}, {"y": scores})
    assert not any(math.isnan(value.value) for value in chosen.compute().values())
    chosen.add({"t": np.array([0, 1])}, {"y": scores})
    for value in chosen.compute().values():
        assert math.isnan(value.value)
        assert value.reason == "the output 'y' contains NaN"


def test_without_a_label_that_counts_a_metric_is_nan_and_says_so() -> None:
    source = ScoredOutput(
        output="y", labels="t", kind=CLASSES, class_axis=1, ignore_index=-1, sample_weights="w"
    )
    names = ["accuracy", "top-2", "f1", "auc", "perplexity"]
    chosen = MetricSet(choose_metrics(names, make_manifest(source, y=("N", 3))))
    scores, weights = np.zeros((2, 3), np.float32), np.array([1, 0], np.float32)
    chosen.add({"t": np.array([-1, 2]), "w": weights}, {"y": scores})
    for value in chosen.compute().values():
        assert math.isnan(value.value)
        assert value.reason == "no label counts: all are ignored, or weigh 0"
