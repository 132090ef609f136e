"""Tables of scores and labels: the axis of the classes, what is ignored, weights, and blocks."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.manifests import ScoredOutput
from splitonnx.runtime.client.metrics import labelled_scores
from splitonnx.runtime.client.metrics.choices import Metric
from splitonnx.runtime.client.metrics.labelled_scores import iter_blocks
from tests.support.scored_manifests import BINARY, CLASSES


def make_metric(source: ScoredOutput, size: int) -> Metric:
    return Metric(name="f1", kind="f1", source=source, size=size)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_classes_come_from_their_axis_with_each_sample_s_weight(axis: int) -> None:
    source = ScoredOutput(
        output="y", labels="t", kind=CLASSES, class_axis=axis, ignore_index=-1, sample_weights="w"
    )
    scores = np.arange(2 * 3 * 2 * 5, dtype=np.float32).reshape(2, 3, 2, 5)
    labels = np.zeros(np.delete(scores.shape, axis), np.int64)
    labels[1, 1, 1] = -1
    weights = np.array([0.5, 2], np.float32)
    (block,) = iter_blocks(
        make_metric(source, scores.shape[axis]), {"t": labels, "w": weights}, {"y": scores}
    )
    kept = [place for place in np.ndindex(labels.shape) if place != (1, 1, 1)]
    expected = [scores[(*place[:axis], slice(None), *place[axis:])] for place in kept]
    np.testing.assert_array_equal(block.scores, expected)
    np.testing.assert_array_equal(block.weights, [weights[place[0]] for place in kept])
    assert len(block.labels) == len(kept)


def test_columns_stay_together_and_other_shapes_become_one_column() -> None:
    source = ScoredOutput(output="y", labels="t", kind=BINARY, sample_weights="w")
    data = {"t": np.ones((2, 3), np.float32), "w": np.array([1, 2], np.float32)}
    outputs = {"y": np.arange(6, dtype=np.float32).reshape(2, 3)}
    (block,) = iter_blocks(make_metric(source, 3), data, outputs)
    assert block.scores.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert block.weights.tolist() == [1, 2]
    (block,) = iter_blocks(make_metric(source, 1), data, outputs)
    assert block.scores.tolist() == [[0], [1], [2], [3], [4], [5]]
    assert block.weights.tolist() == [1, 1, 1, 2, 2, 2]


def test_blocks_are_limited_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled_scores, "BLOCK", 8)
    source = ScoredOutput(output="y", labels="t", kind=CLASSES, class_axis=1)
    data = {"t": np.arange(5) % 3}
    outputs = {"y": np.zeros((5, 3), np.float32)}
    blocks = list(iter_blocks(make_metric(source, 3), data, outputs))
    assert [len(block.scores) for block in blocks] == [2, 2, 1]
    assert np.concatenate([block.labels for block in blocks]).tolist() == [0, 1, 2, 0, 1]


def test_a_batch_without_samples_has_nothing() -> None:
    source = ScoredOutput(output="y", labels="t", kind=CLASSES, class_axis=1)
    empty = {"t": np.zeros(0, np.int64)}
    assert list(iter_blocks(make_metric(source, 3), empty, {"y": np.zeros((0, 3))})) == []
