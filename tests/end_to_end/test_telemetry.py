"""What ONNX Runtime would report to its maker: nothing leaves, and no identifier is kept."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

IMPORT = "import onnxruntime"
RUN = "from splitonnx.runtime.engine.engines import Engine; Engine()"
"""Imports ONNX Runtime as every program of ours does."""


def list_left_behind(python: Path, code: str, home: Path) -> list[Path]:
    """List the files that a program leaves in an empty home and working folder."""
    home.mkdir()
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}  # without CI, which turns it off
    program = subprocess.run(
        [python, "-B", "-c", code], cwd=home, env=environment, capture_output=True, check=True
    )
    assert program.stderr == b""
    return [path for path in home.rglob("*") if path.is_file()]


def test_the_stock_runtime_keeps_no_identifier_of_the_device(
    portable_python: Path, tmp_path: Path
) -> None:
    if not list_left_behind(portable_python, IMPORT, tmp_path / "alone"):
        pytest.skip("this ONNX Runtime keeps nothing")
    assert list_left_behind(portable_python, RUN, tmp_path / "ours") == []
