"""What may be on disk after the power fails, worked out from the system calls that were made.

A kill leaves the system's memory intact, a loss of power does not.  The model is the weakest that
file systems keep to: the bytes of a file are there once ``fsync`` of it returned; names made,
changed or taken away in a folder since the last ``fsync`` of that folder are there or not, each
for itself.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath as Path

from tests.support.tracing import Stop

_CREATE = os.O_CREAT
_WRITES = ("write", "pwrite64", "writev", "ftruncate")

Files = Mapping[str, int | None]
"""Each file's path, and its number, which it keeps under another name; ``None``: bytes may lack."""


class Disk:
    """A disk that system calls are made on; ``folders`` and ``files`` are on it for certain."""

    def __init__(self, folders: Iterable[str], files: Iterable[str]) -> None:
        self._numbers = itertools.count()
        self._names = {name: next(self._numbers) for name in (*folders, *files)}
        self._folders = {self._names[name] for name in folders}
        self._unsure: set[int] = set()  # files whose bytes may not be there
        self._current = dict(self._names)
        self._pending: list[tuple[str, str, int | None]] = []  # folder, name, what it names

    def apply(self, stop: Stop) -> None:
        """Make a call that returned; the ones that failed change nothing."""
        if stop.result is None or stop.result < 0:
            return
        match stop.call:
            case "openat" if stop.arguments[2] & _CREATE and stop.paths[0] not in self._current:
                self._name(stop.paths[0], self._make())
            case "mkdir" | "mkdirat":
                self._folders.add(made := self._make())
                self._unsure.discard(made)
                self._name(stop.paths[0], made)
            case "link" | "linkat":
                self._name(stop.paths[1], self._current[stop.paths[0]])
            case "rename" | "renameat" | "renameat2":
                if self._current.get(stop.paths[1]) == self._current[stop.paths[0]]:
                    return  # two names of one file: the call does nothing
                self._name(stop.paths[1], self._current[stop.paths[0]])
                self._name(stop.paths[0], None)
            case "unlink" | "unlinkat" | "rmdir":
                self._name(stop.paths[0], None)
            case "fsync" | "fdatasync":
                self._sync(stop.paths[0])
            case call if call in _WRITES and stop.paths[0] in self._current:
                self._unsure.add(self._current[stop.paths[0]])

    def lose_power(self) -> Iterator[Files]:
        """Yield all that may be found: every choice of what is pending."""
        for size in range(len(self._pending) + 1):
            for chosen in itertools.combinations(self._pending, size):
                names = dict(self._names)
                for _, name, file in chosen:
                    _set(names, name, file)
                yield {
                    name: None if file in self._unsure else file
                    for name, file in names.items()
                    if file not in self._folders and _is_reached(name, names)
                }

    def _make(self) -> int:
        made = next(self._numbers)
        self._unsure.add(made)
        return made

    def _name(self, name: str, file: int | None) -> None:
        self._pending.append((str(Path(name).parent), name, file))
        _set(self._current, name, file)

    def _sync(self, path: str) -> None:
        self._unsure.discard(self._current.get(path, -1))
        for folder, name, file in self._pending:
            if folder == path:
                _set(self._names, name, file)
        self._pending = [entry for entry in self._pending if entry[0] != path]


def _set(names: dict[str, int], name: str, file: int | None) -> None:
    if file is None:
        names.pop(name, None)
    else:
        names[name] = file


def _is_reached(name: str, names: Mapping[str, int]) -> bool:
    """Whether every folder on the way to a file is there; the first two are the test's own."""
    folders = [str(folder) for folder in Path(name).parents][:-1]
    return all(folder in names for folder in folders)
