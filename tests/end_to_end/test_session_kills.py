"""`serve` and `train` are killed before they change a file, and started again: no bit differs.

Every third change is tried here; ``python -m tests.support.session_kills FOLDER server`` tries
each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.conftest import ROOT
from tests.support.session_kills import STEPS, Training
from tests.support.tracing import NAMES

STRIDE = 3
LIMIT = 300
"""Seconds for all kills of a kind; a tenth of it is usual."""


@pytest.mark.skipif(not NAMES, reason="NOT TESTED: kills before changes need Linux's ptrace")
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_process_killed_before_any_change_of_a_file_ends_with_the_same_weights(
    side: str, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.support.session_kills",
        str(tmp_path),
        side,
        str(STRIDE),
    ]
    single = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # a process of several does not fork well
    done = subprocess.run(
        command, cwd=ROOT, env=single, capture_output=True, text=True, check=False, timeout=LIMIT
    )
    if "TracingRefused" in done.stderr:
        pytest.skip("NOT TESTED: kills before changes, for ptrace is not permitted here")
    assert done.returncode == 0, done.stderr
    *killed, whole = msgspec.json.decode(done.stdout, type=list[Training])
    assert whole.killed_before == ""
    assert {training.killed_before.split()[0] for training in killed} > {"openat", "unlink"}
    for training in killed:
        assert training.steps == {"client": STEPS, "server": STEPS}
        assert training.states == whole.states, training.killed_before
