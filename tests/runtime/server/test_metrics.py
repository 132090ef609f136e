"""What Prometheus is told."""

from __future__ import annotations

import threading

import pytest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from splitonnx.runtime.server.metrics import MAX_REASONS, Metrics
from tests.support.step_metrics import count_a_step


def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
    _, text = metrics.render()
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_what_is_counted_is_rendered() -> None:
    metrics = Metrics(["train", "predict"])
    metrics.set_sessions(2)
    metrics.set_sessions(1)
    metrics.open_connection()
    metrics.close_connection()
    metrics.count_step("train")
    metrics.observe("compute", 0.02)
    metrics.count_bytes("up", 700)
    metrics.count_reconnect()
    metrics.count_refusal("WrongToken")
    metrics.count_checkpoint("failed")
    found = read(metrics)
    for name, value in {
        ("splitonnx_sessions",): 1,
        ("splitonnx_connections",): 0,
        ("splitonnx_steps_total", "train"): 1,
        ("splitonnx_steps_total", "predict"): 0,
        ("splitonnx_step_seconds_count", "compute"): 1,
        ("splitonnx_step_seconds_sum", "compute"): 0.02,
        ("splitonnx_step_seconds_bucket", "0.01", "compute"): 0,
        ("splitonnx_step_seconds_bucket", "0.025", "compute"): 1,
        ("splitonnx_bytes_total", "up"): 700,
        ("splitonnx_bytes_total", "down"): 0,
        ("splitonnx_reconnects_total",): 1,
        ("splitonnx_refusals_total", "WrongToken"): 1,
        ("splitonnx_checkpoints_total", "failed"): 1,
        ("splitonnx_checkpoints_total", "saved"): 0,
    }.items():
        assert found[name] == value, name
    assert metrics.render()[0].startswith("text/plain")


def test_two_servers_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.count_step("train")
    assert read(second)["splitonnx_steps_total", "train"] == 0


def test_reasons_are_bounded_whoever_invents_them() -> None:
    metrics = Metrics()
    for number in range(10 * MAX_REASONS):
        metrics.count_refusal(f"Reason{number}")
    found = {key: value for key, value in read(metrics).items() if "refusals_total" in key[0]}
    assert len(found) == MAX_REASONS + 1
    assert found["splitonnx_refusals_total", "other"] == 9 * MAX_REASONS
    assert sum(found.values()) == 10 * MAX_REASONS


def test_a_phase_that_is_none_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        Metrics(["train"]).count_step("explode")


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(2000):
            metrics.count_step("train")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(metrics)["splitonnx_steps_total", "train"] == 8000


def test_what_counts_in_a_step_looks_up_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would take most of the time, as ``benchmarks/metrics_cost.py`` shows."""
    metrics = Metrics()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a label is looked up in a step")

    monkeypatch.setattr(MetricWrapperBase, "labels", refuse)
    count_a_step(metrics)
    with pytest.raises(AssertionError, match="looked up"):
        metrics.count_refusal("WrongToken")  # which is in no step
    assert read(metrics)["splitonnx_steps_total", "train"] == 1


def test_nothing_is_kept_of_a_step_but_numbers() -> None:
    metrics = Metrics()
    count_a_step(metrics)
    once = len(read(metrics))
    for _ in range(100):
        count_a_step(metrics)
    assert len(read(metrics)) == once
