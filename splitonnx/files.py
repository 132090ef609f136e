"""Open regular files, and refuse pipes, devices and folders.

Reading from a pipe without a writer would block forever, and the content of a device such as
``/dev/zero`` is endless.  Therefore every file named by a user or a bundle is opened with this
module.  It is independent of file formats.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from pathlib import Path

_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
)
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path, most: int | None = None) -> int:
    """Open a regular file for reading and return its file descriptor; symbolic links are followed.

    Raises:
        OSError: the file is missing, is not a regular file, has more than ``most`` bytes, or cannot
            be opened; ``strerror`` contains the reason.
    """
    try:
        _check(path, os.stat(path), most)  # some devices act on being opened
        handle = os.open(path, _FLAGS)
    except ValueError as error:  # a null byte in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    try:
        _check(path, os.fstat(handle), most)
    except OSError:
        os.close(handle)
        raise
    return handle


def read_regular(path: str | Path, most: int) -> bytes:
    """Read and return the content of a regular file of at most ``most`` bytes.

    Raises:
        OSError: the file has more than ``most`` bytes, or cannot be opened or read; ``strerror``
            contains the reason.
    """
    with open(open_regular(path, most), "rb") as file:
        size = os.fstat(file.fileno()).st_size  # read() allocates as much as it is asked for
        content = file.read(min(size, most) + 1)
    if len(content) > most:  # the file grew meanwhile
        raise _refuse(path, most)
    return content


def map_regular(path: str | Path) -> memoryview:
    """Memory-map a regular file read-only; its bytes are read from disk when they are accessed.

    Raises:
        OSError: the file is empty, or cannot be opened; ``strerror`` contains the reason.
    """
    handle = open_regular(path)
    try:
        return memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ))
    except ValueError as error:  # an empty file cannot be mapped
        raise OSError(errno.EINVAL, "it is empty", str(path)) from error
    finally:
        os.close(handle)


def _check(path: str | Path, found: os.stat_result, most: int | None) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
    if most is not None and found.st_size > most:
        raise _refuse(path, most)


def _refuse(path: str | Path, most: int) -> OSError:
    return OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
