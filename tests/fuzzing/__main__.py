"""``python -m tests.fuzzing SECONDS``: cut mutants until the time is over; keep what is found.

Each finding's model and report are written into the folder ``fuzz-findings`` under its seed.
``python -m tests.fuzzing --seed SEED`` tries one mutant again, in this process.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.fuzzing.trials import make_mutant, run_trials, try_mutant


def main() -> int:
    """Run the trials; 1 where there was a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("seconds", type=float, nargs="?", default=600)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, help="try so many, however long it takes")
    parser.add_argument("--seed", type=int, help="try this seed alone, in this process")
    parser.add_argument("--folder", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    if options.seed is not None:
        print(*try_mutant(make_mutant(options.seed), options.seed), sep="\n")
        return 0
    seconds = options.seconds if options.count is None else math.inf
    seeds = range(options.start, options.start + (options.count or 10**9))
    return run(seconds, seeds, options.folder)


def run(seconds: float, seeds: Sequence[int], folder: Path) -> int:
    """Try mutants until the time is over or the seeds are; 1 where there was a finding."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for trial in run_trials(seeds):
        counts[trial.outcome] += 1
        if trial.outcome == "finding":
            folder.mkdir(exist_ok=True)
            (folder / f"{trial.seed}.onnx").write_bytes(make_mutant(trial.seed))
            (folder / f"{trial.seed}.txt").write_text(trial.report)
            print(f"seed {trial.seed}: {trial.report.strip().splitlines()[-1]}", flush=True)
        if time.monotonic() > end:
            break
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 1 if counts["finding"] else 0


if __name__ == "__main__":
    sys.exit(main())
