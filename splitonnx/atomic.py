"""Write files and folders atomically: completely or not at all.

Each process and thread writes under a temporary name of its own, so that the next writer can find
and remove what a killed process left behind.  If the system can exchange two names in one step
(Linux, macOS), a folder that is being replaced exists at every moment.  Otherwise the replacement
takes two renames, and if the process is killed between them, the old folder is restored later.
This module deals with names and does not interpret the content of files.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from splitonnx.folder_locks import FolderLock

if TYPE_CHECKING:
    import numpy as np

_HERE, _EXCHANGE, _SWAP = -100, 2, 2
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_MOST_READS = 10
_own: set[Path] = set()
"""Files and folders that threads of this process are writing, or have moved aside."""

_UNFINISHED = re.compile(
    r"\..+\.safetensors\.(?P<process>[0-9]+)(-[0-9]+)?|\.fresh\..+\.safetensors", re.DOTALL
)
"""Names of tensor files that are being written; the latter is that of earlier versions."""

_Found = TypeVar("_Found")


def write_file(path: Path, chunks: Iterable[bytes | memoryview | np.ndarray]) -> None:
    """Write chunks to a file and wait until they are on disk, without copying large chunks.

    Raises:
        OSError: the file cannot be written; a partly written file remains.
    """
    from splitonnx.chunks import iter_chunks  # numpy, which `--help` needs not

    with path.open("wb") as file:
        for chunk in chunks:
            for piece in iter_chunks(chunk):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write a file to; the file replaces ``path`` if the block succeeds.

    After the block, the file is on disk under the name ``path``.  If the block raises, the
    temporary file is deleted and ``path`` is unchanged.  The block must wait until the content is
    on disk, like :func:`write_file` does.

    Raises:
        OSError: the file cannot be moved to ``path``.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    _own.add(fresh)
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        with suppress(OSError):  # the reason why it failed is told, not this
            fresh.unlink(missing_ok=True)  # also where both are one file, which no rename moves
        _own.discard(fresh)
    sync_folder(path.parent)


def replace_file(path: Path, chunks: Iterable[bytes | memoryview | np.ndarray]) -> None:
    """Write a complete file, replacing an existing one, or leave everything unchanged.

    Raises:
        OSError: the file cannot be written; nothing has changed.
    """
    with replacing(path) as fresh:
        write_file(fresh, chunks)


def append_line(path: Path, line: bytes) -> None:
    """Append a whole line to a file and wait until it is on disk; on failure append nothing.

    If the file does not exist, it is created with access for its owner only.

    Raises:
        OSError: the line cannot be written; the file is unchanged.
    """
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, stat.S_IRUSR | stat.S_IWUSR)
    with open(handle, "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        try:
            left = memoryview(line)
            while left:  # a disk that becomes full takes a part
                left = left[file.write(left) :]
            os.fsync(handle)
        except OSError:
            file.truncate(size)
            raise


def clear_unfinished(folder: Path) -> None:
    """Remove unfinished files of killed writers from a folder, but not those of running processes.

    Raises:
        OSError: the folder cannot be read.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(folder):
            match = _UNFINISHED.fullmatch(name)
            if match is None or folder / name in _own:
                continue
            if not is_other_alive(int(match["process"] or 0)):
                with suppress(OSError):
                    (folder / name).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk; on Windows this does nothing.

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


def write_folder(target: Path, write: Callable[[Path], None], marker: str) -> None:
    """Create the folder ``target``, or replace it in one step; ``write`` creates its content.

    During the replacement, every replaced folder that contains a file ``marker`` is locked.

    Raises:
        FolderInUse: one of these folders is being served or trained.
        OSError: the folder cannot be written; nothing has changed.
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
    """Read the files of a folder, and read them again if the folder was replaced meanwhile.

    ``errors`` are the exceptions that reading a mixture of the old and the new folder may raise.
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
    """Restore a folder that a killed process moved aside and did not replace."""
    if target.exists() or not target.name:
        return
    for aside in _list_own(target, r"previous"):
        with suppress(OSError):
            os.rename(aside, target)
            return


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return False if the system cannot do that.

    Raises:
        OSError: the system supports it, but the exchange failed.
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


def is_other_alive(process: int) -> bool:
    """Return whether another process with this number is running."""
    if process in (0, os.getpid()) or os.name == "nt":  # Windows keeps an open file from going
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


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
