"""What the metrics of one training step cost a server, in processor time.

python -m benchmarks.metrics_cost
"""

from __future__ import annotations

import statistics
import time

from splitonnx.runtime.server.metrics import Metrics
from tests.support.step_metrics import count_a_step

ROUNDS = 50
STEPS = 1000
"""Steps of a round."""


def main() -> None:
    """Measure rounds, and print the fastest and the median."""
    metrics = Metrics()
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(STEPS):
            count_a_step(metrics)
        rounds.append((time.process_time() - start) / STEPS * 1e6)
    print(f"metrics of a step: {min(rounds):.1f} us, median {statistics.median(rounds):.1f} us")


if __name__ == "__main__":
    main()
