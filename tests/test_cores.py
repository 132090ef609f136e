"""The cores that a process may use, against what it was bound to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from splitonnx.cores import count_cores, is_bound

BOUND = """
import os
from splitonnx.cores import count_cores, is_bound
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(count_cores(), is_bound() == (os.cpu_count() > 1))
"""


def test_a_process_has_at_least_one_core_and_at_most_the_machines() -> None:
    assert 1 <= count_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process")
def test_a_process_that_is_bound_to_a_core_has_one() -> None:
    done = subprocess.run([sys.executable, "-c", BOUND], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "True"]


def test_a_system_that_binds_no_process_gives_it_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert count_cores() == os.cpu_count()
    assert not is_bound()
