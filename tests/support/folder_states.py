"""Kill a process in each state in which its system calls leave a folder.

What a killed process leaves on disk is what its system calls made, and between two of them it
changes nothing.  So it runs once, and its folder is read before and after each call; then it is
killed at the first stop of each state that was found, which must leave that very state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from splitonnx.folder_locks import NAME as LOCK
from tests.support.tracing import NAMES, Stop, trace

WHOLE = "whole"
"""The folder of the run that is not killed."""

Act = Callable[[Path], object]
Tree = Mapping[str, tuple[int, bytes | None]]
"""Path in the folder -> its mode, and the content of a file; unfinished files have no process."""
_PROCESS = re.compile(r"\.\d+(-\d+|\.(?!previous)\w+)?(?=$|\.previous$)")
"""The end of an unfinished file's or folder's name: a process and what it adds."""
_CHANGING = frozenset(NAMES.values())
"""The calls that are counted: others, such as those that ask for memory, differ from run to run."""
_DIGITS = re.compile(rb"\d+")


def kill_in_each_state(folder: Path, prepare: Act, act: Act) -> list[Stop]:
    """Run ``act`` to its end in a prepared folder ``whole``, then kill it once in each state.

    Each kill has a folder of its own, prepared alike, and named by its number from 1.

    Returns:
        The stops of the run that was not killed.
    """
    stops = list[Stop]()
    states = list[tuple[int, Tree]]()
    counted = 0
    whole = folder / WHOLE
    prepare(whole)
    with closing(trace(lambda: act(whole))) as watched:
        for stop in watched:
            stops.append(stop)
            if stop.call not in _CHANGING:
                continue
            counted += 1
            tree = read_tree(whole)
            if not states or tree != states[-1][1]:
                states.append((counted, tree))
    assert states
    assert read_tree(whole) == states[-1][1]  # it stood there while the process could be killed
    for number, (last, tree) in enumerate(states, 1):
        place = folder / str(number)
        prepare(place)
        _kill_at(place, act, last)
        assert read_tree(place) == tree, f"stop {last} of those that change files"
    return stops


def _kill_at(place: Path, act: Act, last: int) -> None:
    """Run ``act`` and kill it at the stop of that number, of those at calls that change files."""
    with closing(trace(lambda: act(place))) as watched:
        changing = (stop for stop in watched if stop.call in _CHANGING)
        for number, _ in enumerate(changing, 1):
            if number == last:
                return
    raise AssertionError(f"it ended before stop {last}")


def list_left(folder: Path) -> list[Path]:
    """List the folders that the kills left, in order, and that of the whole run last."""
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    assert numbers == list(range(1, len(numbers) + 1))
    return [*(folder / str(number) for number in numbers), folder / WHOLE]


def read_tree(folder: Path) -> Tree:
    """Read all that is in a folder."""
    return {
        _leave_process_out(path.relative_to(folder)): (path.lstat().st_mode, _read(path))
        for path in sorted(folder.rglob("*"))
    }


def _read(path: Path) -> bytes | None:
    if path.is_dir():
        return None
    content = path.read_bytes()  # a lock's is the number of the process that has it
    return _DIGITS.sub(b"N", content) if path.name == LOCK else content


def _leave_process_out(path: Path) -> str:
    """Leave out what a name has of the process that writes it, as two processes differ in that."""
    return "/".join(_PROCESS.sub("", part) if part.startswith(".") else part for part in path.parts)
