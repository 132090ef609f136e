"""Files: opened only where they are regular, and written completely or not at all.

A pipe without a writer would be waited for without end, and a device such as ``/dev/zero`` never
ends: whatever a user or a bundle names is opened here.  What is being written has a name of its own
for each process and thread, by which the next writer knows what a killed one left.  This module
knows no format.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splitonnx.chunks import iter_chunks

_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
)
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_UNFINISHED = re.compile(
    r"\..+\.safetensors\.(?P<process>[0-9]+)(-[0-9]+)?|\.fresh\..+\.safetensors", re.DOTALL
)
"""Names of tensor files that are being written; the latter is that of earlier versions."""
_writing: set[Path] = set()
"""What the threads of this process are writing now."""


def open_regular(path: str | Path, most: int | None = None) -> int:
    """Open a regular file for reading, links to one included, and return its descriptor.

    Raises:
        OSError: it is missing, is a pipe, a device or a folder, or has more than ``most`` bytes;
            ``strerror`` says so.
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
    """Read a regular file of at most ``most`` bytes.

    Raises:
        OSError: as :func:`open_regular`.
    """
    with open(open_regular(path, most), "rb") as file:
        size = os.fstat(file.fileno()).st_size  # as much as is asked for is taken at once
        content = file.read(min(size, most) + 1)
    if len(content) > most:  # it grew meanwhile
        raise _refuse(path, most)
    return content


def map_regular(path: str | Path) -> memoryview:
    """Map a regular file, read-only; its bytes are read from disk where they are looked at.

    Raises:
        OSError: as :func:`open_regular`, or it is empty.
    """
    handle = open_regular(path)
    try:
        return memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ))
    except ValueError as error:  # an empty file cannot be mapped
        raise OSError(errno.EINVAL, "it is empty", str(path)) from error
    finally:
        os.close(handle)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write chunks to a file and wait until they are on disk; large ones are not copied.

    Raises:
        OSError: it cannot be written; what was written of it stays.
    """
    with path.open("wb") as file:
        for chunk in chunks:
            for piece in iter_chunks(chunk):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to in place of ``path``; it is gone when the block ends.

    The block renames it to ``path`` once it is whole.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    _writing.add(fresh)
    try:
        yield fresh
    finally:
        with suppress(OSError):  # the reason why it failed is told, not this
            fresh.unlink(missing_ok=True)
        _writing.discard(fresh)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed writers left in a folder; what a living process writes stays.

    Raises:
        OSError: the folder cannot be read.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(folder):
            match = _UNFINISHED.fullmatch(name)
            if match is None or folder / name in _writing:
                continue
            if not is_other_alive(int(match["process"] or 0)):
                with suppress(OSError):
                    (folder / name).unlink(missing_ok=True)


def is_other_alive(process: int) -> bool:
    """Return whether a process with that number runs, other than this one."""
    if process in (0, os.getpid()) or os.name == "nt":  # Windows keeps an open file from going
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on disk; Windows cannot be asked to.

    Raises:
        OSError: the folder cannot be opened, or the disk fails.
    """
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems sync no folders
                raise
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
