"""Folders that appear completely or not at all, and take another's place in one step.

Where the system can exchange two names at once (Linux, macOS), a folder that is replaced is at its
place at every moment.  Elsewhere there are two renames, and what was moved aside comes back by
itself if the process is killed between them.  This module knows names and no content.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from splitonnx.files import is_other_alive, sync_folder
from splitonnx.folder_locks import FolderLock

_HERE, _EXCHANGE, _SWAP = -100, 2, 2
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_MOST_READS = 10
_own: set[Path] = set()
"""What threads of this process write, or have moved aside, at this moment."""

_Found = TypeVar("_Found")


def write_folder(target: Path, write: Callable[[Path], None], marker: str) -> None:
    """Create or replace the folder ``target`` in one go, with what ``write`` puts into it.

    Of what is replaced, each folder with a file ``marker`` is locked meanwhile.

    Raises:
        FolderInUse: one of them is served or trained.
        OSError: it cannot be written; all is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    _clear(target)
    prefix = f".{target.name}.{os.getpid()}."
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent))
        _own.add(Path(scratch))
        stack.callback(_own.discard, Path(scratch))
        for place in _find_marked(target, marker):
            stack.callback(FolderLock.acquire(place).release)
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        write(fresh)
        for folder, _, _ in os.walk(fresh):
            sync_folder(Path(folder))
        if not target.exists():
            os.rename(fresh, target)
        elif not exchange(fresh, target):
            _replace(fresh, target)
        sync_folder(target.parent)


def read_steadily(folder: Path, read: Callable[[], _Found], *errors: type[Exception]) -> _Found:
    """Read a folder's files; again where another folder took its place meanwhile.

    ``errors`` are those that a mixture of two folders may raise.
    """
    for _ in range(_MOST_READS):
        recover(folder)
        recover(folder.parent)
        before = _identify(folder)
        try:
            found = read()
        except errors:
            if _identify(folder) == before:
                raise
        else:
            if _identify(folder) == before:
                return found
    return read()


def recover(target: Path) -> None:
    """Restore what a killed process moved aside and did not replace."""
    if target.exists() or not target.name:
        return
    for aside in _list_own(target, r"previous"):
        with suppress(OSError):
            os.rename(aside, target)
            return


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; false where the system cannot.

    Raises:
        OSError: it can, and failed.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        paths = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            failed = libc.renamex_np(*paths, _SWAP)
        elif sys.platform == "linux":
            failed = libc.renameat2(_HERE, paths[0], _HERE, paths[1], _EXCHANGE)
        else:
            return False
    except (AttributeError, OSError, TypeError):  # an older libc; Windows has none of that name
        return False
    code = ctypes.get_errno()
    if failed and code not in _UNABLE:
        raise OSError(code, os.strerror(code), str(other))
    return not failed


def _replace(fresh: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.{os.getpid()}.previous")
    _own.add(aside)
    try:
        os.rename(target, aside)
        try:
            os.rename(fresh, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        _own.discard(aside)


def _clear(target: Path) -> None:
    """Remove what killed processes left beside a folder that is at its place."""
    if target.exists():
        for left in _list_own(target, r"previous"):
            shutil.rmtree(left, ignore_errors=True)
    for left in _list_own(target, r"[a-z0-9_]{8}"):
        shutil.rmtree(left, ignore_errors=True)


def _list_own(target: Path, ending: str) -> list[Path]:
    """List what processes that have ended left beside a folder under such names."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.([0-9]+)\.{ending}")
    found = []
    with suppress(OSError):
        for name in os.listdir(target.parent):
            match = pattern.fullmatch(name)
            path = target.with_name(name)
            if match and path not in _own and not is_other_alive(int(match[1])):
                found.append(path)
    return found


def _find_marked(target: Path, marker: str) -> list[Path]:
    if not target.is_dir():
        return []
    return [place for place in (target, *target.iterdir()) if (place / marker).is_file()]


def _identify(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
