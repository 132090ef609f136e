"""A slice of the fuzzing: mutants of a fixed row of seeds end in a bundle or a named error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.skipif(os.name == "nt", reason="mutants are tried in forked processes")
def test_mutated_models_are_cut_or_refused_by_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzzing", "--count", "300", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finding" not in done.stdout
