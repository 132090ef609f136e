"""Write files and folders atomically: either all of the new content appears, or nothing changes.

Content is first written under a temporary name.  This name contains the process ID, so that a later
writer can find and remove the temporary files of a process that was killed.

Linux and macOS can swap the names of two folders in one step, so a folder that is being replaced
never disappears.  On other systems the replacement takes two renames.  If the process is killed
between them, :func:`recover` can restore the old folder later.

This module does not interpret the content of files.
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
"""Names of temporary tensor files.  The second alternative matches the names that earlier versions
used."""

_Found = TypeVar("_Found")


def write_file(path: Path, chunks: Iterable[bytes | memoryview | np.ndarray]) -> None:
    """Write chunks of bytes to a file and wait until they are on disk.

    Large chunks are not copied.

    Raises:
        OSError: the file cannot be written; a partly written file may remain.
    """
    from splitonnx.chunks import iter_chunks  # imports numpy, which --help does not need

    with path.open("wb") as file:
        for chunk in chunks:
            for piece in iter_chunks(chunk):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a new file that replaces ``path`` if the block succeeds.

    The block must write the file and wait until its content is on disk, for example with
    :func:`write_file`.  The file is then renamed to ``path``, and the new name is on disk before
    this function returns.  If the block raises an exception, the temporary file is deleted and
    ``path`` is unchanged.

    Raises:
        OSError: the file cannot be moved to ``path``.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    _own.add(fresh)
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        with suppress(OSError):  # the original error matters more
            fresh.unlink(missing_ok=True)  # renaming does nothing if both are links to one file
        _own.discard(fresh)
    sync_folder(path.parent)


def replace_file(path: Path, chunks: Iterable[bytes | memoryview | np.ndarray]) -> None:
    """Write a file atomically, replacing any existing file with the same name.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    with replacing(path) as fresh:
        write_file(fresh, chunks)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file and wait until it is on disk.

    If the file does not end with a line break, add a line break first.  If the file does not exist,
    create it so that only its owner can access it.

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
            while left:  # a disk that fills up takes only a part
                left = left[file.write(left) :]
            os.fsync(handle)
        except OSError:
            file.truncate(size)
            raise


def clear_unfinished(folder: Path) -> None:
    """Remove the temporary tensor files that killed processes left behind in a folder.

    Files that are still being written by running processes are kept.

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
    """Wait until new, renamed and deleted entries of a folder have been recorded on disk.

    On Windows, this function does nothing.

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
    """Create or replace the folder ``target`` atomically.

    ``write`` is called with the path of a temporary folder and must create the content there.
    If ``target`` exists, it and its direct subfolders are locked during the replacement.  Folders
    without a file named ``marker`` are not locked.

    Raises:
        FolderInUse: one of the folders to lock is being served or trained.
        OSError: the folder cannot be written; an existing folder is unchanged.
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
    """Read files from a folder; if the folder is replaced in the meantime, read them again.

    ``read`` reads the files and returns the result.  ``errors`` are the exceptions that ``read``
    may raise if it finds a mixture of old and new files.  If ``read`` raises one of them and the
    folder was replaced, the files are also read again.
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
    """Restore the old folder if a process was killed while replacing ``target``."""
    if target.exists() or not target.name:
        return
    for aside in _list_own(target, r"previous"):
        with suppress(OSError):
            os.rename(aside, target)
            return


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step; return ``False`` if the system cannot do that.

    Raises:
        OSError: the system can swap names, but the swap failed.
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
    except (AttributeError, OSError, TypeError):  # the libc is too old, or this is Windows
        return False
    code = ctypes.get_errno()
    if failed and code not in _UNABLE:
        raise OSError(code, os.strerror(code), str(other))
    return not failed


def is_other_alive(process: int) -> bool:
    """Return whether ``process`` is the ID of another running process.

    The result is always ``False`` on Windows.
    """
    if process in (0, os.getpid()) or os.name == "nt":  # Windows keeps open files
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
    """Remove temporary folders of killed processes, and old versions of an existing folder."""
    if target.exists():
        for left in _list_own(target, r"previous"):
            shutil.rmtree(left, ignore_errors=True)
    for left in _list_own(target, r"[a-z0-9_]{8}"):
        shutil.rmtree(left, ignore_errors=True)


def _list_own(target: Path, ending: str) -> list[Path]:
    """List folders beside ``target`` that ended processes left; ``ending`` matches their names."""
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
