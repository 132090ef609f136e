"""Kill a process that replaces a folder, in each state that its system calls leave behind.

    python -m tests.support.folder_kills FOLDER exchange|renames

leaves a folder for each kill with what the process left of a folder ``target`` and beside it, as
``folder_states`` names them, and prints how many stops before and after a call there were.
``renames`` is how it is done where the system cannot exchange two names at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from splitonnx import atomic
from splitonnx.atomic import write_file, write_folder
from tests.support.folder_states import kill_in_each_state

MARKER = "manifest.json"


def replace(folder: Path, content: str) -> None:
    """Write a folder ``target`` of two files."""

    def write(fresh: Path) -> None:
        for name in (MARKER, "content"):
            write_file(fresh / name, [content.encode()])

    write_folder(folder / "target", write, MARKER)


def run(folder: Path, way: str) -> int:
    if way == "renames":
        atomic.exchange = lambda one, other: False

    def prepare(place: Path) -> None:
        place.mkdir()
        replace(place, "old")

    return len(kill_in_each_state(folder, prepare, lambda place: replace(place, "new")))


def find_content(folder: Path) -> str:
    """Read the folder as after a fault: all of it must be of one of the two."""
    target = folder / "target"
    read = [(target / name).read_text for name in (MARKER, "content")]
    one, other = atomic.read_steadily(target, lambda: [text() for text in read], OSError)
    assert one == other
    return one


if __name__ == "__main__":
    print(run(Path(sys.argv[1]), sys.argv[2]))
