"""The command line, run as a user runs it: what it prints, what it writes, how it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import AT, MODEL, Command


def test_help_names_every_command(command: Command) -> None:
    out = command.succeed("--help")
    for name in ("inspect", "cut", "serve", "train", "predict", "merge", "verify"):
        assert f" {name} " in out
        assert "--" in command.succeed(name, "--help")


def test_help_needs_neither_onnx_nor_numpy() -> None:
    script = """
import sys
sys.argv = ["splitonnx", "train", "--help"]
from splitonnx.commands import main
try:
    main()
except SystemExit:
    pass
print(sorted({"onnx", "onnx_ir", "onnxruntime", "numpy", "websockets"} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["cut"], "Missing argument"),
        (["cut", MODEL, "-o", "bundle"], "--at"),
        (["cut", MODEL, "--speed", "11"], "--speed"),
        (["serve", "bundle/server", "--port", "99999"], "--port"),
        (["inspect", MODEL, "--batch", "0"], "--batch"),
        (["explode"], "explode"),
    ],
)
def test_a_slip_in_the_command_line_is_one_line_too(
    command: Command, words: list[object], reason: str
) -> None:
    assert reason in command.fail(*words)


@pytest.mark.parametrize("name", ["check", "inspect", "cut"])
def test_a_command_that_ends_with_its_model_leaves_the_memory_to_the_system(
    name: str, tmp_path: Path
) -> None:
    script = """
import atexit, gc
from splitonnx.commands import main
# runs behind what the command registers
atexit.register(lambda: print(gc.isenabled(), len(gc.get_objects()), gc.get_freeze_count() > 5e4))
main()
"""
    options = ["--at", AT, "--send-labels", "-o", str(tmp_path / "bundle")] if name == "cut" else []
    done = subprocess.run(
        [sys.executable, "-c", script, name, str(MODEL), *options],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "False 0 True"  # off, and nothing is left to look at


INTERRUPTED = """
from splitonnx import commands

def app(**_):
    exec("raise KeyboardInterrupt")

commands.app = app
commands.main()
"""
"""Ctrl-C in code that is run from a string, as most of ``dataclasses`` is."""


def test_a_command_that_was_interrupted_in_generated_code_ends_with_130(tmp_path: Path) -> None:
    """On earlier versions it ends by SIGINT, which only shells turn into 130."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
