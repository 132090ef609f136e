"""``python tests/attacks/slow_disk.py FILE WORDS...``: run splitonnx on a disk that may be held.

While FILE exists, whoever lets a file be written through to the disk waits.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from pathlib import Path

INTERVAL = 0.01


def hold(held: Path) -> None:
    """Let ``os.fsync`` wait while the file exists."""
    sync, pause = os.fsync, threading.Event()

    def wait(descriptor: int) -> None:
        if held.exists():
            print("the disk is waited for", file=sys.stderr, flush=True)
        while held.exists():
            pause.wait(INTERVAL)
        sync(descriptor)

    os.fsync = wait  # type: ignore[assignment]


if __name__ == "__main__":
    hold(Path(sys.argv[1]))
    sys.argv = ["splitonnx", *sys.argv[2:]]
    runpy.run_module("splitonnx", run_name="__main__")
