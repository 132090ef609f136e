"""Kill a process that replaces a folder, at every system call of it in turn.

    python -m tests.support.folder_kills FOLDER exchange|renames

leaves a folder for each kill, named by the number of the stop, with what the process left of a
folder ``target`` and beside it.  ``renames`` is how it is done where the system cannot exchange two
names at once.
"""

from __future__ import annotations

import itertools
import sys
from contextlib import closing
from pathlib import Path

from splitonnx import atomic
from splitonnx.atomic import write_file, write_folder
from tests.support.tracing import trace

MARKER = "manifest.json"


def replace(folder: Path, content: str) -> None:
    """Write a folder ``target`` of two files."""

    def write(fresh: Path) -> None:
        for name in (MARKER, "content"):
            write_file(fresh / name, [content.encode()])

    write_folder(folder / "target", write, MARKER)


def run(folder: Path, way: str) -> None:
    if way == "renames":
        atomic.exchange = lambda one, other: False
    for number in itertools.count(1):
        place = folder / str(number)
        place.mkdir()
        replace(place, "old")
        stops = 0
        with closing(trace(lambda place=place: replace(place, "new"))) as watched:  # type: ignore[misc]
            for _ in watched:
                stops += 1
                if stops == number:
                    break
        if stops < number:
            return


def find_content(folder: Path) -> str:
    """Read the folder as after a fault: all of it must be of one of the two."""
    target = folder / "target"
    read = [(target / name).read_text for name in (MARKER, "content")]
    one, other = atomic.read_steadily(target, lambda: [text() for text in read], OSError)
    assert one == other
    return one


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
