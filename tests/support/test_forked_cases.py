"""A case in a forked process ends as it would in a fresh one, and the next is none the worse."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.forked_cases import forking

pytestmark = pytest.mark.skipif(os.name == "nt", reason="cases are forked")


def main() -> None:
    """Be a case: these words are what is run here."""
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGFPE)
    Path(sys.argv[1]).read_text()
    print(sys.argv[1:])


def test_each_case_has_its_own_end() -> None:
    with forking(__name__) as run:
        died = run("die")
        failed = run("nowhere")
        done = run(__file__, "more")
    assert died.returncode == -signal.SIGFPE
    assert failed.returncode == 1
    assert "FileNotFoundError" in failed.stderr
    assert (done.returncode, done.stdout) == (0, f"{[__file__, 'more']}\n")
