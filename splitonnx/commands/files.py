"""Output files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from splitonnx.errors import UnwritableFile


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise before the work rather than after it where something stands in the output's place.

    Raises:
        UnwritableFile: ``path`` exists and ``force`` is not set.
    """
    if path.exists() and not force:
        raise UnwritableFile(str(path), "it exists already; overwrite it with --force")


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        UnwritableFile: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise UnwritableFile(str(path), error.strerror or str(error)) from error
    finally:
        fresh.unlink(missing_ok=True)
