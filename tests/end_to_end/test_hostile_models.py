"""Hostile and broken models at the command line: one line, exit code 2, nothing written.

Each model of the table is cut and inspected in a process with 2 GiB of memory to spend.  ``cut``
must refuse every one; ``inspect``, which differentiates nothing, may list the cuts of some.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, build_once
from tests.support.hostile import HOSTILE, complete

pytestmark = pytest.mark.skipif(os.name == "nt", reason="limits are set on forked processes")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], dict[str, Any]]:
    """Run both commands on every model of the table, once for pytest's processes."""
    found = json.loads(build_once(tmp_path_factory, "hostile", screen_all).read_text())
    return {(outcome["name"], outcome["command"]): outcome for outcome in found}


def screen_all(scratch: Path) -> Path:
    """Screen the models in folders of ``scratch``, and write what came of them to a file."""
    models = scratch / "models"
    for name, (make, _) in HOSTILE.items():
        folder = models / name
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(complete(make(folder)))
    command = [sys.executable, "-m", "tests.fuzzing.screenings", str(models)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    made = scratch / "outcomes.json"
    made.write_text(json.dumps([json.loads(line) for line in done.stdout.splitlines()]))
    return made


@pytest.mark.parametrize("command", ["cut", "inspect"])
@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_one_line(
    name: str, command: str, outcomes: Mapping[tuple[str, str], dict[str, Any]]
) -> None:
    outcome = outcomes[name, command]
    assert outcome["code"] == 2 or (command == "inspect" and outcome["code"] == 0), outcome
    assert not outcome["written"]
    assert outcome["megabytes"] < 1500, outcome
    if outcome["code"] == 0:
        assert not outcome["errors"]
        return
    (line,) = outcome["errors"].splitlines()
    assert line.startswith("splitonnx: ")
    assert line.isprintable()
    assert len(line) < 5000
    assert not outcome["printed"]
    if command == "cut":
        assert HOSTILE[name][1] in line
