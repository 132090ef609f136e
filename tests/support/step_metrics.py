"""What a server counts in a step of training, for a test and for ``benchmarks/metrics_cost.py``."""

from __future__ import annotations

from splitonnx.runtime.server.metrics import DIRECTIONS, Metrics

MESSAGES = 2
"""Of a step, in each direction."""


def count_a_step(metrics: Metrics) -> None:
    """Count all that a server counts in a step of training."""
    metrics.count_step("train")
    metrics.observe("receive", 0.01)
    metrics.observe("compute", 0.01)
    metrics.observe("send", 0.01)
    for direction in DIRECTIONS:
        for _ in range(MESSAGES):
            metrics.count_bytes(direction, 1000)
