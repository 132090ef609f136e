"""How soon the example's page answers a tap on a slow phone, idle and while it trains.

The page is open in Chromium at a phone's size, its thread slowed four times
(``tests/support/taps.py``), and its ten buttons are tapped one after the other, some four taps a
second. Each measurement has its own browser and server. The page's thread has a core of its own, as
on a phone, or shares the machine's with the worker, the server and this script: of two cores the
slowed thread then keeps one busy by itself.

Exit code 1 if, at a training page with a core of its own, more than one tap in a hundred took more
than 100 ms, or more than one task in a hundred took 50 ms of processor time.  A single one proves
nothing: at an idle page some take as long on a machine whose cores are not its own.

    python -m benchmarks.taps [--taps 60] [--rounds 5]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tests.support.browsers import cut_digits, tracing
from tests.support.taps import TIMELY, count_late, holding_a_phone

PAUSE = 0.15
"""Seconds that a quick finger takes from one button to the next."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How long each tap took to be answered, and each task of the page's thread, in milliseconds.

    A tap's time is by the clock, a task's is processor time.
    """

    taps: list[float]
    tasks: list[float]

    def __add__(self, other: Measurement) -> Measurement:
        """Join two measurements of the same kind."""
        return Measurement(taps=self.taps + other.taps, tasks=self.tasks + other.tasks)


def measure(bundle: Path, *, taps: int, is_training: bool, is_alone: bool) -> Measurement:
    """Tap ``taps`` times and measure each tap, and each task of the page's thread meanwhile."""
    with holding_a_phone(bundle, is_alone=is_alone) as (screen, finger):
        if is_training:
            screen.start(passes=10)
            screen.wait_for_step(5)
        with tracing(finger.devtools) as tasks:
            for tap in range(taps):
                finger.tap(tap % 10)
                time.sleep(PAUSE)
        if is_training and screen.page.inner_text("#start") != "Stop":
            raise SystemExit("the training ended before the taps did: use fewer --taps")
        return Measurement(taps=finger.durations(), tasks=tasks)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--taps", type=int, default=60, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # of pages that go
    found: dict[tuple[bool, bool], Measurement] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = cut_digits(Path(folder))
        for _, kind in product(range(options.rounds), product((True, False), (False, True))):
            is_alone, is_training = kind
            measured = measure(
                bundle, taps=options.taps, is_training=is_training, is_alone=is_alone
            )
            found[kind] = found[kind] + measured if kind in found else measured
    show(found)
    training = found[True, True]
    is_late = find_last_percentile(training.taps) > TIMELY
    # A tap waits for one task and is answered in the next.
    is_tasked = find_last_percentile(training.tasks) > TIMELY / 2
    return int(is_late or is_tasked)


def find_last_percentile(durations: list[float]) -> float:
    """Return the milliseconds within which 99 of 100 ended."""
    return statistics.quantiles(durations, n=100)[-1]


def show(found: dict[tuple[bool, bool], Measurement]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("the page's thread")
    table.add_column("the page")
    headings = ("taps", "median ms", "99 of 100", "longest", f"over {TIMELY:.0f} ms")
    for heading in (*headings, "99 of 100 tasks", "longest task"):
        table.add_column(heading, justify="right")
    for (is_alone, is_training), measured in found.items():
        durations = measured.taps
        table.add_row(
            "has a core of its own" if is_alone else "shares the cores",
            "trains" if is_training else "is idle",
            str(len(durations)),
            f"{statistics.median(durations):.0f}",
            f"{find_last_percentile(durations):.0f}",
            f"{max(durations):.0f}",
            str(count_late(durations)),
            f"{find_last_percentile(measured.tasks):.0f}",
            f"{max(measured.tasks):.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
