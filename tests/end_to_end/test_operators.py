"""Every ONNX operator's gradient, in every node case of the onnx package, on both targets."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import build_once
from tests.support import portable_stages
from tests.support.operator_page import (
    NATIVE,
    PAGE,
    REWRITTEN,
    describe_operator,
    list_operators,
    share_trials,
    try_operator,
    write_page,
)

RTOL = 1e-4
LEAST = 120
"""Operators that must be differentiable on both targets."""


@pytest.fixture(scope="module", autouse=True)
def shared_trials(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let pytest's processes try each operator once together."""
    share_trials(build_once(tmp_path_factory, "operator-trials", lambda folder: folder))


@pytest.mark.filterwarnings("ignore")  # numpy warns of what the reference evaluator overflows
@pytest.mark.parametrize("operator", list_operators())
def test_gradients_and_values_are_right_or_refused_in_a_sentence(operator: str) -> None:
    for outcome in try_operator(operator):
        assert outcome.ok or outcome.refusal, outcome
        assert "\n" not in outcome.refusal
        assert not outcome.refusal.startswith("FAILED"), outcome


@pytest.mark.filterwarnings("ignore")
def test_every_portable_case_trains_alike_on_stock_onnxruntime(
    tmp_path: Path, portable_python: Path
) -> None:
    taken = [
        outcome
        for operator in list_operators()
        for outcome in try_operator(operator)
        if outcome.target == "portable" and not outcome.refusal
    ]
    for outcome in taken:
        feeds: dict[str, Any] = outcome.feeds
        (tmp_path / f"{outcome.case}.onnx").write_bytes(outcome.graph)
        np.savez(tmp_path / f"{outcome.case}.npz", **feeds)
    script = Path(portable_stages.__file__)
    command = [portable_python, script, tmp_path]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    failures = {path.stem: path.read_text() for path in tmp_path.glob("*.err")}
    assert not failures
    for outcome in taken:
        found = np.load(tmp_path / f"{outcome.case}.out.npz")
        for name, expected in outcome.found.items():
            scale = float(np.abs(expected, dtype=np.float64).max(initial=0.0)) or 1.0
            difference = np.abs(found[name].astype(np.float64) - expected)
            assert not (difference > RTOL * scale).any(), (outcome.case, name)


@pytest.mark.filterwarnings("ignore")
def test_the_page_of_operators_is_fresh_and_long_enough() -> None:
    rows = [describe_operator(name) for name in list_operators()]
    differentiable = [
        row
        for row in rows
        if all(status in (NATIVE, REWRITTEN) for status in row.statuses.values())
    ]
    assert len(differentiable) >= LEAST
    assert PAGE.read_text() == write_page(rows), (
        "write it anew: python -m tests.support.operator_page"
    )
