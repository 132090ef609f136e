"""The command line in this process, and what its tests share."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from splitonnx.commands import main

MODEL = Path(__file__).parents[2] / "examples" / "digits.onnx"

AT, TAIL_AT = "/block1/Relu_output_0", "/block3/MaxPool_1_output_0"

SAMPLES = 24


class Command:
    """Runs the entry point in this process: ``command(...)`` gives exit code, stdout, stderr."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch = patch
        self._capture = capture

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._patch.setattr(sys, "argv", ["splitonnx", *map(str, arguments)])
        self._capture.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            gc.enable()  # this process does not end with the command
            gc.unfreeze()
        captured = self._capture.readouterr()
        assert code is None or isinstance(code, int)
        return code or 0, captured.out, captured.err

    def succeed(self, *arguments: object) -> str:
        """Run it, expect success and an empty stderr but for progress, and give stdout."""
        code, out, err = self(*arguments)
        assert code == 0, err
        return out

    def fail(self, *arguments: object) -> str:
        """Run it, expect exit code 2 and one line on stderr, and give that line."""
        code, out, err = self(*arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        return err


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "splitonnx", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
