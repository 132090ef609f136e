"""Check whether an output can be written before starting the work that produces it.

Conditions may change before the output is written, and therefore the code that writes it must still
handle errors.  This module does not create anything.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from splitonnx.errors import UnwritableFile
from splitonnx.files import open_regular

_LONGEST_NAME = 255
"""The longest name in bytes on most file systems.  If a file system allows less, writing fails."""


def check_file_place(path: Path) -> None:
    """Check, as far as possible in advance, that a file can be written to ``path``.

    Raises:
        OSError: the file cannot be written, for example because ``path`` is a folder or a device;
            ``strerror`` contains the reason.
    """
    check_place(path)
    if path.exists():
        os.close(open_regular(path))


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check that ``path`` can be written, and does not exist yet unless ``overwrite`` is true.

    Raises:
        UnwritableFile: the file cannot be written, or exists already and must not be overwritten.
    """
    try:
        check_file_place(path)
    except OSError as error:
        raise UnwritableFile(str(path), error.strerror or str(error)) from error
    if path.exists() and not overwrite:
        raise UnwritableFile(str(path), "it exists already; choose another place or overwrite")


def check_place(path: Path) -> None:
    """Check, as far as possible in advance, that a file or folder can be created at ``path``.

    Raises:
        OSError: the name is not valid, or the nearest existing parent is not a writable folder;
            ``strerror`` contains the reason.
    """
    name = _encode(path.name, path)
    if not path.name.strip():
        raise _refuse(errno.EINVAL, "it has no name", path)
    if len(name) > _LONGEST_NAME:
        raise _refuse(errno.ENAMETOOLONG, "its name is too long", path)
    for folder in path.absolute().parents:
        try:
            found = os.stat(folder)
        except FileNotFoundError:
            if len(_encode(folder.name, path)) > _LONGEST_NAME:
                reason = "the name of a folder above it is too long"
                raise _refuse(errno.ENAMETOOLONG, reason, path) from None
        except NotADirectoryError:
            continue  # the path that is not a folder is above this one
        else:
            _check_folder(folder, found.st_mode, path)
            return


def _check_folder(folder: Path, mode: int, path: Path) -> None:
    if not stat.S_ISDIR(mode):
        raise _refuse(errno.ENOTDIR, f"'{folder}' is not a folder", path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refuse(errno.EACCES, f"'{folder}' may not be written to", path)


def _encode(name: str, path: Path) -> bytes:
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError as error:
        raise _refuse(errno.EINVAL, "its name is not text", path) from error
    if b"\0" in encoded:
        raise _refuse(errno.EINVAL, "a null byte is in its name", path)
    return encoded


def _refuse(code: int, reason: str, path: Path) -> OSError:
    return OSError(code, reason, str(path))
