"""Results of a batch are those of its samples, or not, whatever axis the batch is on."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.partitioner.cutting.conformance.alignments import (
    measure_merged,
    measure_somehow_stacked,
    measure_stacked,
    stack,
)

A, B = np.arange(6.0).reshape(1, 2, 3), 10 + np.arange(6.0).reshape(1, 2, 3)


def test_inputs_are_joined_on_their_batch_axes_and_others_are_shared() -> None:
    pieces = [{"x": A, "h": A.swapaxes(0, 1), "s": A}, {"x": B, "h": B.swapaxes(0, 1), "s": B}]
    joined = stack(pieces, {"x": 0, "h": 1})
    np.testing.assert_array_equal(joined["x"], np.concatenate([A, B]))
    np.testing.assert_array_equal(joined["h"], np.concatenate([A, B]).swapaxes(0, 1))
    np.testing.assert_array_equal(joined["s"], A)


@pytest.mark.parametrize(
    ("found", "pieces", "rows"),
    [
        (np.concatenate([A, B]), [A, B], 1),
        (np.concatenate([A, B], 1).reshape(1, 4, 3)[0], [A[0], B[0]], 1),
        (np.stack([A[0], B[0]]), [A[0], B[0]], 1),
        (np.concatenate([A, B]).swapaxes(0, 1), [A.swapaxes(0, 1), B.swapaxes(0, 1)], 1),
        (np.concatenate([A[0], B[0]], 1), [A[0], B[0]], 3),
        (np.arange(5.0), [np.arange(3.0), np.arange(3.0, 5.0)], 1),
    ],
    ids=["first", "flattened", "new", "second", "rows", "unequal"],
)
def test_samples_one_after_the_other_are_no_difference(
    found: np.ndarray, pieces: list[np.ndarray], rows: int
) -> None:
    assert measure_stacked(found, pieces, rows) == 0
    assert measure_somehow_stacked(found, pieces, rows) == 0


@pytest.mark.parametrize(
    "found",
    [
        np.concatenate([B, A]),
        np.concatenate([A, A]),
        (A + B) / 2,
        A,
        np.concatenate([A, B]).reshape(1, 4, 3),
        np.stack([A, B], 3).reshape(1, 2, 6),
    ],
    ids=["swapped", "repeated", "mean", "dropped", "swallowed", "interleaved"],
)
def test_other_results_are_a_difference(found: np.ndarray) -> None:
    assert measure_stacked(found, [A, B], 1) > 0.1
    assert measure_somehow_stacked(found, [A, B], 1) > 0.1


def test_within_a_model_the_batch_may_be_merged_behind_another_axis() -> None:
    steps = np.stack([A[0], B[0]], 1).reshape(4, 3)  # all samples' first step, then the second
    assert measure_somehow_stacked(steps, [A[0], B[0]], 1) == 0
    assert measure_stacked(steps, [A[0], B[0]], 1) > 0.1


def test_an_axis_that_may_hold_the_batch_may_be_named() -> None:
    channels = np.concatenate([A, B], 1)
    assert measure_merged(channels, [A, B], {0, 1}) == 0
    assert measure_merged(channels, [A, B], {0}) > 0.1
    assert measure_merged(A, [A, A], {0, 1, 2}) > 0.1  # one of the samples is gone


def test_a_loss_may_be_the_mean_or_the_sum_of_the_samples_losses() -> None:
    losses = [np.array([1.0]), np.array([4.0])]
    for loss in (2.5, 5.0):
        assert measure_stacked(np.array([loss]), losses, 1, is_mean=True) == 0
        assert measure_stacked(np.array([loss]), losses, 1) > 0.1
        assert measure_stacked(np.array(loss), [np.array(1.0), np.array(4.0)], 1) == 0
    assert measure_stacked(np.array([np.sqrt(8.5)]), losses, 1, is_mean=True) > 0.1
