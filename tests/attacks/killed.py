"""``python tests/attacks/killed.py TARGET NUMBER WAY WORDS...``: run splitonnx, and kill it.

The process kills itself just before the NUMBERth rename or removal of a folder that is TARGET or
stands beside it.  WAY ``renames`` is how folders are replaced where the system cannot exchange two
names at once; it makes no difference to a checkout that never exchanges.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
from contextlib import suppress

EVENTS = ("os.rename", "shutil.rmtree")


def kill_before(target: str, number: int) -> None:
    """Let the process kill itself before such an event."""
    place, name = os.path.split(target)
    seen = 0

    def look(event: str, found: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in EVENTS:
            return
        paths = [os.path.split(str(part)) for part in found]
        if any(path[0].startswith(place) and name in "/".join(path) for path in paths):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


if __name__ == "__main__":
    target, number, way, *words = sys.argv[1:]
    if way == "renames":
        for module in ("atomic", "folders"):  # the latter is an earlier version's, if it has one
            with suppress(ImportError):
                found = importlib.import_module(f"splitonnx.{module}")
                vars(found)["exchange"] = lambda one, other: False
    kill_before(target, int(number))
    sys.argv = ["splitonnx", *words]
    runpy.run_module("splitonnx", run_name="__main__")
