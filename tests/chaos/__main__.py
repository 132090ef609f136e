"""``python -m tests.chaos --seed N``: train through faults; the weights must not show it.

Two trainings, vanilla and U-shaped, each once without faults and once through a proxy that cuts,
while both processes are killed and started again.  With ``--clients`` and ``--policy``, several
clients train one model instead, U-shaped, each through a proxy of its own.  With ``--wire``, what
crosses the cut is encoded; with ``--micro-batches``, steps have several in flight.  Exit code 1
where a bit differs, a training hangs, or it went through fewer faults than asked for; the folder
with bundles and logs is then kept.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from splitonnx.names import PER_CLIENT
from splitonnx.runtime.server.policies.policy_options import POLICIES
from tests.chaos.scenarios import SCENARIOS, Scenario
from tests.chaos.trials import Outcome, Quota, run_trial


def main() -> int:
    """Run the trials; 1 where there was a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="of the faults; drawn where it is not given")
    parser.add_argument("--cuts", type=int, default=2000, help="connection cuts, at least")
    parser.add_argument("--kills", type=int, default=100, help="kills of each side, at least")
    parser.add_argument("--clients", type=int, default=1, help="that train one model together")
    parser.add_argument("--policy", choices=POLICIES, default=PER_CLIENT, help="of the server")
    parser.add_argument("--wire", default="fp32", help="the codecs of what crosses the cut")
    parser.add_argument("--micro-batches", type=int, default=1, help="of each step, in flight")
    parser.add_argument("--folder", type=Path, help="where to work; it must not exist yet")
    options = parser.parse_args()
    if (options.policy == PER_CLIENT) != (options.clients == 1):
        parser.error(
            "several clients need a --policy that joins what they learn, and it needs them"
        )
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    folder = options.folder or Path(tempfile.mkdtemp(prefix="splitonnx-chaos-"))
    print(f"seed {seed}, in {folder}", flush=True)
    start = time.monotonic()
    listed = _choose(options.policy, options.clients)
    chosen = tuple(
        replace(scenario, wire=options.wire, micro_batches=options.micro_batches)
        for scenario in listed
    )
    share = len(chosen)
    quota = Quota(cuts=-(-options.cuts // share), kills=-(-options.kills // share))
    outcomes = []
    for scenario in chosen:
        outcome = run_trial(scenario, folder / scenario.name, quota, seed, _show)
        for finding in outcome.findings:
            print(f"{scenario.name}: {finding}", flush=True)
        outcomes.append(outcome)
    return _conclude(chosen, outcomes, seed, time.monotonic() - start, folder)


def _choose(policy: str, clients: int) -> tuple[Scenario, ...]:
    if policy == PER_CLIENT:
        return SCENARIOS
    together = Scenario(name="together", at="r1", tail_at=("flat",), clients=clients, policy=policy)
    return (together,)


def _show(line: str) -> None:
    print(line, flush=True)


def _conclude(
    chosen: tuple[Scenario, ...], outcomes: list[Outcome], seed: int, seconds: float, folder: Path
) -> int:
    trainings = [outcome.training for outcome in outcomes if outcome.training is not None]
    figures = (
        f"{sum(t.cuts for t in trainings)} cuts, "
        f"{sum(t.kills['server'] for t in trainings)} kills of the server, "
        f"{sum(t.kills['client'] for t in trainings)} of clients, "
        f"{sum(t.made for t in trainings)} steps, {seconds:.0f} s, seed {seed}"
    )
    if any(outcome.findings for outcome in outcomes):
        print(f"{figures}: NOT GOOD; see {folder}")
        return 1
    shutil.rmtree(folder)
    found = (
        "bit for bit" if all(scenario.is_deterministic for scenario in chosen) else "by the rule"
    )
    print(f"{figures}: good, the weights are those of the runs without faults, {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
