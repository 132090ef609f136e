"""Models drawn at random compute, once they are cut, what onnx's own evaluator says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.support.random_graphs.sweeps import try_models

GRAPHS = int(os.environ.get("SPLITONNX_GRAPHS", "500"))
"""How many are drawn in the sweep; a first seed for them is in SPLITONNX_SEED."""
SEED = int(os.environ.get("SPLITONNX_SEED", "1"))
FEW = 30


def test_a_few_models_are_cut_without_a_difference() -> None:
    """Draw them in a process of their own: Hypothesis draws constants of the modules imported."""
    command = [sys.executable, "-m", "tests.support.random_graphs.sweeps"]
    done = subprocess.run(
        [*command, "--graphs", str(FEW), "--seed", "7", "--shrink"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{FEW} " in done.stdout


@pytest.mark.sweep
def test_many_models_are_cut_without_a_difference() -> None:
    tally = try_models(GRAPHS, SEED, is_shrunk=True)
    assert len(tally.operators) > 100
    assert sum(tally.refusals.values()) < GRAPHS / 4
