"""Read named arrays from numpy's files: an ``.npz`` file, or the ``.npy`` files of a folder.

A file is refused if it is not a regular file, if it contains Python objects, or if it is an
``.npz`` file that does not fit into memory.  The caller checks the arrays against the model's
declarations.  :func:`read_declared` uses the declarations only to decide which arrays it must read
in full.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from splitonnx.errors import UnusableData
from splitonnx.files import open_regular
from splitonnx.runtime.limits import measure_memory
from splitonnx.tensors import TensorSpec


def list_batch_files(path: Path) -> list[Path]:
    """List the ``.npz`` files of a folder by name; the list is empty if there are none.

    Raises:
        UnusableData: the folder cannot be read, or it contains ``.npy`` files as well.
    """
    with _refusing(path):
        files = sorted(path.glob("*.npz")) if path.is_dir() else []
        if files and next(path.glob("*.npy"), None) is not None:
            raise UnusableData(
                str(path),
                "it holds .npz and .npy files; a folder has one .npz file for each batch, or one "
                ".npy file for each array",
            )
        return files


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an ``.npz`` file.

    Raises:
        UnusableData: the file cannot be read, has another format, or does not fit into memory.
    """
    with _refusing(path):
        if path.suffix != ".npz":
            raise UnusableData(
                str(path), "data are an .npz file, a folder of .npy files or a folder of .npz files"
            )
        with open(open_regular(path), "rb") as file:
            arrays = dict(_open_archive(file, path))
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):  # numpy returns the bytes of any other file
                raise ValueError(f"'{name}' in it is not an array")
        return arrays


def read_declared(path: Path, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """Read from an ``.npz`` file what :func:`check_batch` needs, and return the arrays by name.

    ``specs`` are the declared tensors.  If a tensor declares bounds for its values, the array is
    read in full.  For any other array, only the header is read, and an array of zeros with the same
    dtype and shape is returned in its place, which takes almost no memory.

    Raises:
        UnusableData: see :func:`read_npz`.
    """
    bounded = {spec.name for spec in specs if spec.bounds is not None}
    with _refusing(path), open(open_regular(path), "rb") as file:
        archive = _open_archive(file, path)
        return {
            name: archive[name] if name in bounded else _read_header(archive, name)
            for name in archive.files
        }


def map_folder(path: Path) -> dict[str, np.ndarray]:
    """Map the ``.npy`` files of a folder into memory, and return the arrays.

    Each array is named after its file, without the suffix.

    Raises:
        UnusableData: a file cannot be read or contains Python objects.
    """
    with _refusing(path):
        return {file.stem: _map_array(file) for file in sorted(path.glob("*.npy"))}


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnusableData(str(path), error.strerror or str(error)) from error
    except (ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise UnusableData(str(path), f"it cannot be read as arrays: {error}") from error


def _open_archive(file: BinaryIO, path: Path) -> np.lib.npyio.NpzFile:
    _check_room(file)
    _check_start(file, "a .npz archive", "np.savez")
    archive = np.load(file, allow_pickle=False)
    if isinstance(archive, np.ndarray):
        raise UnusableData(str(path), "it is a single array, without a name; use np.savez")
    opened: np.lib.npyio.NpzFile = archive
    return opened


def _read_header(archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    assert archive.zip is not None  # the archive is open
    entry = name if name in archive.zip.namelist() else f"{name}.npy"
    with archive.zip.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"'{name}' in it contains Python objects")
    return np.broadcast_to(np.zeros((), dtype), shape)


def _check_room(file: BinaryIO) -> None:
    """Raise an error if the arrays of an archive do not fit into memory together."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > measure_memory():
            reason = f"its arrays take {size / 1e9:.1f} GB, more than this machine's memory"
            raise ValueError(f"{reason}; save them as a folder of .npy files")
    file.seek(0)


def _check_start(file: BinaryIO, expected: str, writer: str) -> None:
    """Raise an error if a file is not empty and begins as neither a .npz nor a .npy file does."""
    start = file.read(8)
    file.seek(0)
    if start and not start.startswith((b"PK", np.lib.format.MAGIC_PREFIX)):
        raise ValueError(f"{expected} was expected, but it begins with {start!r}; use {writer}")


def _map_array(path: Path) -> np.ndarray:
    with open(open_regular(path), "rb") as file:
        _check_start(file, "a .npy file", "np.save")
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
