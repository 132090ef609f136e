"""The peak of a process's memory, against what the process takes and frees again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from splitonnx import peak_memory
from splitonnx.peak_memory import read_peak_memory

MIB = 1 << 20
GROWTH = """
from splitonnx.peak_memory import read_peak_memory
before = read_peak_memory()
taken = bytearray(256 << 20)
for place in range(0, len(taken), 4096):
    taken[place] = 1
del taken
print(before, read_peak_memory())
"""


def test_memory_that_was_freed_again_counts_in_bytes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True
    )
    before, after = map(int, done.stdout.split())
    assert MIB < before < 256 * MIB
    assert 240 * MIB < after - before < 300 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_without_proc_the_system_is_asked_and_says_nearly_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = read_peak_memory()
    monkeypatch.setattr(peak_memory, "_STATUS", Path("/nowhere"))
    found = read_peak_memory()
    assert expected is not None
    assert found is not None
    assert found >= 0.9 * expected
