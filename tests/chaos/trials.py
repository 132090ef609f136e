"""A trial: one scenario trained through faults and without, and compared bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import scenarios
from tests.chaos.faults import Direction, draw_faults
from tests.chaos.scenarios import Scenario
from tests.chaos.supervisors import Collapse
from tests.chaos.trainings import Trainee, Training

REACH = 10
"""Steps within which a connection's fault lies, for most connections."""
STEPS_A_CUT = 2.25
"""Steps that are trained for each cut, and some to spare: 2 were measured."""
STEPS_A_CUT_TOGETHER = 4.25
"""The same for several clients, whose steps are counted together: 3.1 were measured, and 3.75 for
the share of kills.  A server that is killed ends all connections, before their faults strike."""
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

    def count_steps(self, scenario: Scenario) -> int:
        """How many steps of each client are enough for it."""
        cuts = max(self.cuts, self.kills * CUTS_A_KILL)
        if scenario.joins:
            return scenario.round_up(int(cuts * STEPS_A_CUT_TOGETHER / scenario.clients))
        return scenario.round_up(int(cuts * STEPS_A_CUT) + SPARE)

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
    steps = quota.count_steps(scenario)
    rough: Training | None = None
    try:
        bundle = scenarios.copy_bundle(scenario, folder, "calm")
        calm = Training(scenario, bundle, steps, (), f"{seed}")
        calm.run(show)
        show(str(calm))
        faults = [
            draw_faults(f"{seed} {scenario.name} {trainee.name}", _measure_reach(trainee))
            for trainee in calm.trainees
        ]
        bundle = scenarios.copy_bundle(scenario, folder, "rough")
        rough = Training(
            scenario, bundle, steps, faults, f"{seed}", lambda training: not quota.compare(training)
        )
        rough.run(show)
        show(str(rough))
    except Collapse as error:
        return Outcome(training=rough, findings=[str(error)])
    losses = _list_contradictions(calm, rough) if scenario.is_deterministic else []
    return Outcome(
        training=rough,
        findings=[
            *quota.compare(rough),
            *losses,
            *scenarios.compare(scenario, folder / "calm", folder / "rough", steps)[:SHOWN],
        ],
    )


def _measure_reach(calm: Trainee) -> dict[Direction, int]:
    return {
        Direction.UP: REACH * calm.last.bytes_up,
        Direction.DOWN: REACH * calm.last.bytes_down,
    }


def _list_contradictions(calm: Training, rough: Training) -> list[str]:
    """Say where a step came to another loss than it did before, or without faults."""
    told = [c for trainee in rough.trainees for c in trainee.contradictions]
    return [*told[:SHOWN], *_compare_losses(calm, rough)[:SHOWN]]


def _compare_losses(calm: Training, rough: Training) -> list[str]:
    return [
        f"{one.name}: step {step} came to {one.losses[step]} without faults, to {loss} with them"
        for one, other in zip(calm.trainees, rough.trainees, strict=True)
        for step, loss in sorted(other.losses.items())
        if step in one.losses and one.losses[step] != loss
    ]
