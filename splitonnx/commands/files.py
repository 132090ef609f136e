"""Write output files atomically, and check in advance that they can be written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from splitonnx.atomic import replacing, write_folder
from splitonnx.errors import UnwritableFile
from splitonnx.outputs import check_file_place, check_place


def refuse_existing(path: Path, *, force: bool, is_folder: bool = False) -> None:
    """Raise an error if an output exists already or cannot be written.

    Commands call this function before they start their work, so that no work is wasted.

    Raises:
        UnwritableFile: ``path`` exists and ``force`` is not set, or ``path`` is not writable.
    """
    with _translating(path):
        if os.path.lexists(path) and path.name and not force:
            raise UnwritableFile(str(path), "it exists already; overwrite it with --force")
        (check_place if is_folder else check_file_place)(path)


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary output file that replaces ``path`` if the block succeeds.

    If the block raises an exception, the temporary file is deleted.

    Raises:
        UnwritableFile: the file cannot be written.
    """
    with _translating(path):
        check_file_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as fresh, fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


def write_whole_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Create or replace a folder atomically.

    ``write`` is called with the path of a temporary folder and must create the content there.  If
    it raises an exception, ``path`` is unchanged.

    Raises:
        UnwritableFile: the folder cannot be written.
    """
    from splitonnx.manifests import MANIFEST  # imports msgspec, which --help does not need

    with _translating(path):
        check_place(path)
        write_folder(path, write, MANIFEST)


@contextmanager
def _translating(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnwritableFile(str(path), error.strerror or str(error)) from error
