"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def make_environment(folder: Path, *requirements: str) -> Path:
    """Make a fresh virtual environment, install ``requirements``, and return its python."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    command = [str(python), "-m", "pip", "install", "--quiet", *requirements]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="session")
def portable_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment as a device has it: splitonnx[portable], and no onnx.

    SPLITONNX_PORTABLE_PYTHON names one that stands already.
    """
    given = os.environ.get("SPLITONNX_PORTABLE_PYTHON")
    if given:
        return Path(given)
    return make_environment(tmp_path_factory.mktemp("portable-env") / "venv", f"{ROOT}[portable]")
