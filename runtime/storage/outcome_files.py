"""The files of outcomes as bytes, to hand them out without decoding their tensors.

A file is read and not mapped, because a process that reads a mapped file is killed if another
program cuts it short.  It stays open, so that it is the same file whatever gets its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from splitonnx.codecs import decode_metadata
from splitonnx.errors import BundleError, FormatError
from splitonnx.files import open_regular
from splitonnx.states import MAX_HEADER, OUTCOMES, STATE, is_session

_LENGTH_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class OutcomeFile:
    """The open file of an outcome, its size when it was opened, and its metadata."""

    path: Path
    nbytes: int
    metadata: Mapping[str, str]
    file: FileIO = field(repr=False)

    def read(self, offset: int, most: int) -> bytes:
        """Return at most ``most`` bytes from ``offset``, up to the end of the file.

        Raises:
            BundleError: the file was cut short, or cannot be read.
        """
        try:
            self.file.seek(offset)
            content = self.file.read(min(most, self.nbytes - offset))
        except OSError as error:
            raise BundleError(str(self.path), f"it cannot be read: {error.strerror}") from error
        if len(content) != min(most, self.nbytes - offset):
            raise BundleError(str(self.path), "it was cut short while it was read")
        return content


@contextmanager
def opening_outcome(folder: Path, session: str) -> Iterator[OutcomeFile | None]:
    """Open the file of a session's outcome in a party's ``folder`` while the context is open.

    Yield ``None`` if there is none.  The tensors are not verified.

    Raises:
        BundleError: the file cannot be read.
    """
    found = _find(folder, session) if is_session(session) else None
    if found is None:
        yield None
        return
    with found.file:
        yield found


def _find(folder: Path, session: str) -> OutcomeFile | None:
    """Look where the newest outcome is, and earlier ones, between which it may be moved."""
    newest = folder / STATE
    for path in (newest, folder / OUTCOMES / f"{session}.safetensors", newest):
        found = _open(path)
        if found is None:
            continue
        if found.metadata.get("session") == session:
            return found
        found.file.close()
    return None


def _open(path: Path) -> OutcomeFile | None:
    try:
        file = open(open_regular(path), "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BundleError(str(path), f"it cannot be read: {error.strerror}") from error
    try:
        nbytes = os.fstat(file.fileno()).st_size
        return OutcomeFile(path=path, nbytes=nbytes, metadata=_read_metadata(file), file=file)
    except OSError as error:
        file.close()
        raise BundleError(str(path), f"it cannot be read: {error.strerror}") from error


def _read_metadata(file: FileIO) -> dict[str, str]:
    """Read the metadata of a tensor file; they are empty if it is none."""
    length = file.read(_LENGTH_BYTES)
    rest = file.read(min(int.from_bytes(length, "little"), MAX_HEADER))
    try:
        return decode_metadata(length + rest, max_header=MAX_HEADER)
    except FormatError:
        return {}
