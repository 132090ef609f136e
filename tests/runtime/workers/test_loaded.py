"""Processes of ours, and what they leave alone when garbage is collected."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitonnx.runtime.server.servers import Server
from tests.support import tiny

AT_END = """
import atexit, gc, sys
atexit.register(lambda: print("looked at", len(gc.get_objects()), file=sys.stderr, flush=True))
"""
LOOKED_AT = 10_000
"""Objects of a process that has begun to work; with the modules' it is 26,000 to 60,000."""


def count_looked_at(printed: str) -> int:
    """Count the objects that a collection at a process's end would have visited."""
    (line,) = [line for line in printed.splitlines() if line.startswith("looked at")]
    return int(line.split()[-1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.split_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_server_s_collections_visit_only_what_came_since_it_began(folder: Path) -> None:
    """On earlier versions one stops every thread of a server for 50 to 75 ms."""
    command = [sys.executable, "-c", AT_END + "from splitonnx.commands import main; main()"]
    options = ["serve", str(folder / "server"), "--port", "0"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert count_looked_at(process.stderr.read()) < LOOKED_AT


def test_a_worker_s_collections_visit_only_what_came_since_it_began() -> None:
    program = AT_END + "from splitonnx.runtime.workers.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert count_looked_at(done.stderr) < LOOKED_AT


def test_a_training_s_collections_visit_only_what_came_since_it_began(
    folder: Path, tmp_path: Path
) -> None:
    data: dict[str, Any] = dict(tiny.batch(0, size=8))
    np.savez(tmp_path / "data.npz", **data)
    command = [sys.executable, "-c", AT_END + "from splitonnx.commands import main; main()"]
    with Server(folder / "server", port=0, threads=1) as server:
        done = subprocess.run(
            [*command, "train", str(folder / "client"), "--server", server.url,
             "--data", str(tmp_path / "data.npz"), "--quiet"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert count_looked_at(done.stderr) < LOOKED_AT
