"""Models drawn at random compute, once they are cut, what onnx's own evaluator says."""

from __future__ import annotations

import os

import pytest

from tests.support.random_graphs.sweeps import try_models

GRAPHS = int(os.environ.get("SPLITONNX_GRAPHS", "500"))
"""How many are drawn in the sweep; a first seed for them is in SPLITONNX_SEED."""
SEED = int(os.environ.get("SPLITONNX_SEED", "1"))
FEW = 30


def test_a_few_models_are_cut_without_a_difference() -> None:
    tally = try_models(FEW, 7, is_shrunk=True)
    assert tally.slopes
    assert len(tally.operators) > FEW


@pytest.mark.sweep
def test_many_models_are_cut_without_a_difference() -> None:
    tally = try_models(GRAPHS, SEED, is_shrunk=True)
    assert len(tally.operators) > 100
    assert sum(tally.refusals.values()) < GRAPHS / 4
