"""Both event loops that a server may run on, for tests that must pass on each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

UVLOOP = "uvloop"
LOOPS = ("asyncio", UVLOOP)

ON_BOTH_LOOPS = [
    pytest.mark.usefixtures("event_loop"),
    pytest.mark.parametrize("event_loop", LOOPS, indirect=True),
]
"""The marks of a module whose servers in this process run on asyncio, and again on uvloop."""


def use(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the servers of this process run on a loop of ``LOOPS`` from now on."""
    if loop == UVLOOP:
        pytest.importorskip("uvloop", reason="it has no wheel for this platform")
    else:
        monkeypatch.setitem(sys.modules, "uvloop", None)  # as if it were not installed


def make_environment(loop: str, folder: Path) -> dict[str, str]:
    """Return the environment of a process whose server runs on a loop of ``LOOPS``, if it is there.

    ``folder`` may get a module that hides uvloop.
    """
    if loop == UVLOOP:
        return dict(os.environ)
    (folder / "uvloop.py").write_text("raise ImportError('hidden by a test')\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
