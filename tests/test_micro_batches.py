"""Batches are divided by their samples, and weights are parts of what counts."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import UnusableData
from splitonnx.micro_batches import enlarge, find_weights, split_batch
from splitonnx.tensors import TensorSpec


def declare(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="F32", shape=shape)


X, LABELS = declare("x", "N", 4), declare("labels", "N")


def test_micro_batches_have_all_rows_in_order_and_differ_by_one() -> None:
    batch = {"x": np.arange(28.0).reshape(7, 4), "labels": np.arange(7.0)}
    parts = split_batch(batch, [X, LABELS], 3)
    assert [len(part["labels"]) for part in parts] == [3, 2, 2]
    for name, array in batch.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_there_are_no_more_micro_batches_than_rows() -> None:
    parts = split_batch({"x": np.ones((2, 4)), "labels": np.ones(2)}, [X, LABELS], 5)
    assert [len(part["x"]) for part in parts] == [1, 1]


def test_samples_on_another_axis_are_divided_there_and_single_numbers_are_kept() -> None:
    specs = [X, declare("state", 1, "N", 3), declare("scale")]
    batch = {
        "x": np.ones((4, 4)),
        "state": np.arange(12.0).reshape(1, 4, 3),
        "scale": np.array(2.0),
    }
    first, second = split_batch(batch, specs, 2)
    np.testing.assert_array_equal(first["state"], batch["state"][:, :2])
    np.testing.assert_array_equal(second["state"], batch["state"][:, 2:])
    assert first["scale"] == second["scale"] == 2.0


def test_a_fixed_batch_of_one_row_is_divided_row_by_row() -> None:
    specs = [declare("x", 1, 4), declare("labels", 1)]
    assert [spec.shape for spec in enlarge(specs, 3)] == [(3, 4), (3,)]
    parts = split_batch({"x": np.ones((3, 4)), "labels": np.arange(3.0)}, specs, 3)
    assert [part["labels"].tolist() for part in parts] == [[0.0], [1.0], [2.0]]


def test_only_a_fixed_number_of_rows_is_enlarged() -> None:
    specs = [declare("x", 2, 4), declare("labels", 2), declare("scale")]
    assert [spec.shape for spec in enlarge(specs, 3)] == [(6, 4), (6,), ()]
    assert [spec.shape for spec in enlarge([X, LABELS], 3)] == [("N", 4), ("N",)]
    assert enlarge(specs, 1) == tuple(specs)


def test_arrays_that_cannot_be_divided_are_named() -> None:
    table = declare("table", "M", 4)
    batch = {"x": np.ones((4, 4)), "table": np.ones((6, 4))}
    with pytest.raises(UnusableData, match="different numbers of them: 'x' 4, 'table' 6"):
        split_batch(batch, [X, table], 2)
    pairs = declare("pairs", "N + -1", 2)
    with pytest.raises(UnusableData, match="has no axis that counts the samples"):
        split_batch({"x": np.ones((4, 4)), "pairs": np.ones((3, 2))}, [X, pairs], 2)


def test_weights_are_parts_of_what_counts_in_the_loss() -> None:
    counts = [{"loss@counted": 3.0, "accuracy@counted": 1.0}, {"loss@counted": 1.0}]
    assert find_weights(counts) == [0.75, 0.25]
    assert find_weights([{"loss@counted": 0.0}, {"loss@counted": 0.0}]) == [0.0, 0.0]


def test_losses_must_agree_on_the_weights() -> None:
    agree = [{"loss.a@counted": 1.0, "loss.b@counted": 20.0}] * 2
    assert find_weights(agree) == [0.5, 0.5]
    differ = [agree[0], {"loss.a@counted": 1.0, "loss.b@counted": 60.0}]
    with pytest.raises(UnusableData, match=r"counts 0\.5 of the batch in 'loss\.a', and 0\.25"):
        find_weights(differ)
