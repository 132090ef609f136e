"""Files and folders that are written completely or not at all, in one step at their place.

What is being written has a name of its own for each process and thread, by which the next writer
knows what a killed one left.  Where the system can exchange two names at once (Linux, macOS), a
folder that is replaced is at its place at every moment.  Elsewhere there are two renames, and what
was moved aside comes back by itself if the process is killed between them.  This module knows names
and no content.
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
"""What threads of this process write, or have moved aside, at this moment."""

_UNFINISHED = re.compile(
    r"\..+\.safetensors\.(?P<process>[0-9]+)(-[0-9]+)?|\.fresh\..+\.safetensors", re.DOTALL
)
"""Names of tensor files that are being written; the latter is that of earlier versions."""
_writing: set[Path] = set()
"""What the threads of this process are writing now."""

_Found = TypeVar("_Found")


def write_file(path: Path, chunks: Iterable[bytes | memoryview | np.ndarray]) -> None:
    """Write chunks to a file and wait until they are on disk; large ones are not copied.

    Raises:
        OSError: it cannot be written; what was written of it stays.
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
    """Yield a name to write a file to, which takes the place of ``path`` if the block ends well.

    It is on disk under its new name then; after an error it is gone, and ``path`` is as it was.
    The block waits until the content is on disk, as :func:`write_file` does.

    Raises:
        OSError: it cannot take its place.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    _writing.add(fresh)
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        with suppress(OSError):  # the reason why it failed is told, not this
            fresh.unlink(missing_ok=True)  # also where both are one file, which no rename moves
        _writing.discard(fresh)
    sync_folder(path.parent)


def replace_file(path: Path, chunks: Iterable[bytes | memoryview | np.ndarray]) -> None:
    """Write a file whole, in the place of what may be there, or not at all.

    Raises:
        OSError: it cannot be written; all is as it was.
    """
    with replacing(path) as fresh:
        write_file(fresh, chunks)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file, all of it or nothing, and wait until it is on disk.

    A file that is not there yet is made for its owner alone.

    Raises:
        OSError: it cannot be written; the file is as it was.
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
