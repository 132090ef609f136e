"""Lock a party's folder while it is being served or trained, so that it has only one writer.

The lock is advisory.  The operating system holds it on the file ``.lock`` in the folder, and
releases it when the process ends.  The file contains the process ID.  If the file cannot be created
because the folder is read-only or the disk is full, the folder itself is locked instead, except on
Windows, where a folder cannot be locked.  A process cannot lock a folder that it has already
locked.
"""

from __future__ import annotations

import os
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Self

from splitonnx.errors import FolderInUse

NAME = ".lock"

if sys.platform == "win32":
    import msvcrt

    _PLACE = 1 << 30
    """The byte to lock: far behind the file's content, so that other processes can read that."""

    def _try_lock(handle: int) -> bool:
        os.lseek(handle, _PLACE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True


class FolderLock:
    """A lock on a folder; it is released by :meth:`release` or by garbage collection."""

    def __init__(self, folder: Path, handle: int | None, path: Path) -> None:
        self.folder = folder
        self._release = weakref.finalize(self, _let_go, handle, path)

    @classmethod
    def acquire(cls, folder: Path) -> Self:
        """Lock a folder, or raise an error immediately if the folder is already locked.

        Raises:
            FolderInUse: the folder is locked by this process or another process.
        """
        while True:
            handle, path = _open(folder)
            if handle is None:
                return cls(folder, None, path)
            if not _try_lock(handle):
                process = _read_process(handle)
                os.close(handle)
                raise FolderInUse(str(folder), process, is_own=process == os.getpid())
            if _is_same(handle, path):
                break
            os.close(handle)  # its holder removed the file between the two calls
        if path.name == NAME:
            with suppress(OSError):  # the disk is full: the process ID stays unknown
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
        return cls(folder, handle, path)

    def release(self) -> None:
        """Unlock the folder; further calls do nothing."""
        self._release()


def _open(folder: Path) -> tuple[int | None, Path]:
    """Open the file to lock: ``.lock``, or the folder itself.

    The descriptor is ``None`` if neither can be opened.
    """
    path = folder / NAME
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with suppress(OSError):
        return os.open(path, flags, 0o644), path
    with suppress(OSError):  # another user's file: locking does not require write access
        return os.open(path, flags & ~(os.O_RDWR | os.O_CREAT) | os.O_RDONLY), path
    with suppress(OSError):
        return os.open(folder, os.O_RDONLY), folder
    return None, folder


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _read_process(handle: int) -> int | None:
    with suppress(OSError, ValueError):
        os.lseek(handle, 0, os.SEEK_SET)
        return int(os.read(handle, 20))
    return None


def _let_go(handle: int | None, path: Path) -> None:
    """Remove the lock file, and release the lock.

    The file is removed while it is still locked, so that the lock file of another process is never
    removed by mistake.
    """
    if handle is None:
        return
    if path.name == NAME and sys.platform != "win32" and _is_same(handle, path):
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):
        os.close(handle)
    if path.name == NAME and sys.platform == "win32":  # which does not delete open files
        with suppress(OSError):
            path.unlink()
