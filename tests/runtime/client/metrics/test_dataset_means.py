"""Means of a dataset: batches weigh by what counted in them, losses by their weights."""

from __future__ import annotations

from splitonnx.runtime.client.metrics.dataset_means import DatasetMeans


def test_batches_weigh_by_their_size_or_by_what_counted() -> None:
    means = DatasetMeans()
    means.add({"loss": 1.0, "accuracy": 0.5, "accuracy@counted": 3.0}, 4)
    means.add({"loss": 4.0, "accuracy": 1.0, "accuracy@counted": 1.0}, 2)
    assert means.compute() == {"loss": 2.0, "accuracy": 0.625}


def test_a_sum_of_losses_is_the_sum_of_their_means() -> None:
    means = DatasetMeans()
    weights = {"loss.a@weight": 0.5, "loss.b@weight": 2.0}
    means.add({"loss": 2.5, "loss.a": 1.0, "loss.a@counted": 1.0, "loss.b": 1.0, **weights}, 2)
    means.add({"loss": 5.0, "loss.a": 2.0, "loss.a@counted": 3.0, "loss.b": 2.0, **weights}, 2)
    assert means.compute() == {"loss": 0.5 * 1.75 + 2 * 1.5, "loss.a": 1.75, "loss.b": 1.5}


def test_a_batch_adds_its_total_also_where_nothing_counts() -> None:
    means = DatasetMeans()
    means.add({"loss": 0.0, "loss@counted": 0.0, "loss@total": 3.0}, 1)
    means.add({"loss": 2.0, "loss@counted": 2.0, "loss@total": 4.0}, 4)
    assert means.compute() == {"loss": 3.5}


def test_a_mean_of_nothing_is_0() -> None:
    means = DatasetMeans()
    means.add({"loss": 0.0, "loss@counted": 0.0}, 4)
    assert means.compute() == {"loss": 0.0}
    assert DatasetMeans().compute() == {}
