"""An evaluation task by task: what is asked for, and how the answers of batches are joined."""

from __future__ import annotations

import math

import numpy as np
import pytest

from splitonnx.names import EVALUATE, PREDICT, TRAIN
from splitonnx.runtime.client.metrics.accumulators import MetricValue
from splitonnx.runtime.client.metrics.evaluations import (
    EvaluationResults,
    EvaluationTask,
    advance,
    count_samples,
    evaluate,
)
from tests.support import tiny

MANIFEST = tiny.split_bundle().client.manifest


def test_each_batch_is_predicted_and_then_measured_with_what_was_predicted() -> None:
    batches = [tiny.batch(0, 6), tiny.batch(1, 2)]
    tasks = evaluate(MANIFEST, iter(batches))
    found = advance(tasks)
    phases = []
    for batch, loss in zip(batches, (1.0, 5.0), strict=True):
        assert isinstance(found, EvaluationTask)
        phases.append(found.phase)
        assert found.data is batch
        outputs = {"y": np.full((len(batch["x"]), 2), loss, np.float32)}
        found = advance(tasks, outputs)
        assert isinstance(found, EvaluationTask)
        phases.append(found.phase)
        assert found.data.keys() == {"x", "labels", "y"}
        assert found.data["y"] is outputs["y"]
        found = advance(tasks, {"loss": np.array(loss, np.float32)})
    assert phases == [PREDICT, EVALUATE] * 2
    assert isinstance(found, EvaluationResults)
    assert found.numbers == {"loss": pytest.approx((1.0 * 6 + 5.0 * 2) / 8)}


def test_without_a_batch_there_is_nothing_to_ask_for() -> None:
    found = advance(evaluate(MANIFEST, iter([])))
    assert isinstance(found, EvaluationResults)
    assert found.numbers == {}


def test_the_numbers_are_means_and_metrics() -> None:
    undefined = MetricValue(value=math.nan, reason="there is one class")
    results = EvaluationResults(means={"loss": 0.5}, metrics={"auc": undefined})
    assert results.numbers.keys() == {"loss", "auc"}
    assert results.numbers["loss"] == 0.5
    assert math.isnan(results.numbers["auc"])


def test_samples_are_rows_of_the_labels() -> None:
    assert count_samples(MANIFEST, TRAIN, tiny.batch(0, 5)) == 5
