"""A trial: one scenario trained through faults and without, and compared bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import scenarios
from tests.chaos.faults import Direction, draw_faults
from tests.chaos.scenarios import STEPS_AN_EPOCH, Scenario
from tests.chaos.supervisors import Collapse
from tests.chaos.trainings import Training

REACH = 10
"""Steps within which a connection's fault lies, for most connections."""
STEPS_A_CUT = 2.25
"""Steps that are trained for each cut, and some to spare: 2 were measured."""
CUTS_A_KILL = 17
"""Cuts for each kill of a side; see the deck."""
SPARE = 64
"""Steps more than that, for where the first faults lie."""
SHOWN = 4
"""Findings of one sort that are told."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What a training must go through at least: cuts, and kills of each side."""

    cuts: int
    kills: int

    @property
    def epochs(self) -> int:
        """Epochs that are long enough for it."""
        steps = max(self.cuts, self.kills * CUTS_A_KILL) * STEPS_A_CUT + SPARE
        return math.ceil(steps / STEPS_AN_EPOCH)

    def compare(self, training: Training) -> list[str]:
        """Say what a training went through too little of."""
        short = [f"{training.cuts} cuts, wanted {self.cuts}"] if training.cuts < self.cuts else []
        return short + [
            f"{kills} kills of the {party}, wanted {self.kills}"
            for party, kills in training.kills.items()
            if kills < self.kills
        ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a trial; ``findings`` is empty where all is as it should be."""

    training: Training | None
    findings: list[str]


def run_trial(
    scenario: Scenario, folder: Path, quota: Quota, seed: int, show: Callable[[str], None]
) -> Outcome:
    """Train without faults and through them, and compare."""
    folder.mkdir(parents=True)
    scenarios.prepare(scenario, folder)
    rough: Training | None = None
    try:
        calm = Training(
            scenario.name, scenarios.copy_bundle(folder, "calm"), quota.epochs, None, f"{seed}"
        )
        calm.run(show)
        show(str(calm))
        faults = draw_faults(f"{seed} {scenario.name}", _measure_reach(calm))
        rough = Training(
            scenario.name, scenarios.copy_bundle(folder, "rough"), quota.epochs, faults, f"{seed}"
        )
        rough.run(show)
        show(str(rough))
    except Collapse as error:
        return Outcome(training=rough, findings=[str(error)])
    return Outcome(
        training=rough,
        findings=[
            *quota.compare(rough),
            *rough.contradictions[:SHOWN],
            *_compare_losses(calm, rough)[:SHOWN],
            *scenarios.compare(folder / "calm", folder / "rough", calm.steps)[:SHOWN],
        ],
    )


def _measure_reach(calm: Training) -> dict[Direction, int]:
    return {
        Direction.UP: REACH * calm.last.bytes_up,
        Direction.DOWN: REACH * calm.last.bytes_down,
    }


def _compare_losses(calm: Training, rough: Training) -> list[str]:
    return [
        f"step {step} came to {calm.losses[step]} without faults, to {loss} with them"
        for step, loss in sorted(rough.losses.items())
        if step in calm.losses and calm.losses[step] != loss
    ]
