"""Datasets: named arrays that are checked and split into batches.

The arrays are checked against the tensors that the manifest declares for a phase.  This module
reads numpy's file formats, but does not interpret the contents of the arrays.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import msgspec
import numpy as np

from splitonnx.errors import ArrayMismatch, DataError, MissingArray, NotFinite, UnusableData
from splitonnx.expressions import parse_terms
from splitonnx.files import open_regular
from splitonnx.runtime.limits import measure_memory
from splitonnx.tensors import DTYPES, TensorSpec, check_array, describe

Batch: TypeAlias = Mapping[str, np.ndarray]
DataSource: TypeAlias = "str | Path | Batch | Iterable[Batch] | Dataset"


class Dataset(ABC):
    """A dataset of named arrays that is read in batches; created by :func:`open_dataset`."""

    size: int | None
    """Number of samples, or ``None`` if it is not known in advance."""

    @abstractmethod
    def check(self, specs: Sequence[TensorSpec]) -> None:
        """Check the arrays against ``specs``, the declared tensors.

        If the batches come from an iterable, each batch is checked later, when it is read.

        Raises:
            MissingArray, ArrayMismatch, ValueOutOfRange: see :func:`check_batch`.
        """

    @abstractmethod
    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches of one epoch; the same arguments always yield the same batches.

        If the number of samples is not a multiple of ``batch_size``, the last batch is smaller;
        with ``drop_last``, that batch is skipped.

        Raises:
            NotFinite: a floating-point array of the next batch contains NaN or infinity.
            UnusableData: the data can be read only once, or the next batch is not a dictionary of
                arrays.
        """


class ArrayDataset(Dataset):
    """A dataset of arrays that all have one row per sample."""

    size: int

    def __init__(self, arrays: Batch, source: str) -> None:
        if not arrays:
            raise UnusableData(source, "it holds no arrays")
        rows = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
        if len(set(rows.values())) > 1:
            counts = ", ".join(f"'{name}' {count}" for name, count in rows.items())
            raise UnusableData(source, f"its arrays differ in their number of rows: {counts}")
        self.size = next(iter(rows.values()))
        if self.size == 0:
            raise UnusableData(source, "it holds no samples")
        self._arrays = arrays

    def check(self, specs: Sequence[TensorSpec]) -> None:
        """Check the type, shape and values of every array; any number of rows is allowed."""
        check_batch(self._arrays, [_any_rows(spec) for spec in specs])

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches of one epoch; ``seed`` and ``epoch`` determine the shuffled order."""
        order = np.arange(self.size)
        if shuffle:
            np.random.default_rng([seed, epoch]).shuffle(order)
        for start in range(0, self.size, batch_size):
            rows = order[start : start + batch_size]
            if drop_last and len(rows) < batch_size:
                return
            # A slice of a mapped file reads only what it covers, and copies nothing.
            index = rows if shuffle else slice(start, start + batch_size)
            batch = {name: np.asarray(array[index]) for name, array in self._arrays.items()}
            check_finite(batch, "", rows)
            yield batch


class BatchDataset(Dataset):
    """A dataset whose batches come from an iterable, which determines their size and order."""

    size = None

    def __init__(self, source: Iterable[Batch]) -> None:
        self._source = source
        self._specs: Sequence[TensorSpec] = ()
        self._spent = False

    def check(self, specs: Sequence[TensorSpec]) -> None:
        """Store ``specs``, against which each batch is checked when it is read."""
        self._specs = specs

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches of the iterable; all arguments are ignored."""
        if self._spent:
            raise UnusableData(
                "the data", "an iterator lasts for one epoch; pass a list or a dataset"
            )
        self._spent = isinstance(self._source, Iterator)
        for number, batch in enumerate(self._source):
            if not isinstance(batch, Mapping):
                kind = type(batch).__name__
                raise UnusableData("the data", f"batch {number} is a {kind}, no dict of arrays")
            arrays = {name: np.asarray(array) for name, array in batch.items()}
            check_batch(arrays, self._specs)
            check_finite(arrays, f"batch {number}, ")
            yield arrays


def open_dataset(source: DataSource) -> Dataset:
    """Create a dataset from an ``.npz`` file, a folder of ``.npy`` files, named arrays, or batches.

    The arrays must have the names of the model's inputs; the array of targets is named ``labels``.
    Each array has one row per sample.  Files in a folder are memory-mapped and read as needed.
    Batches are passed as an iterable of dictionaries of arrays; the iterable determines the size
    and order of the batches.

    Raises:
        UnusableData: a file cannot be read or contains Python objects, or the arrays differ in
            their number of rows.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, Mapping):
        arrays = {name: np.asarray(array) for name, array in source.items()}
        return ArrayDataset(arrays, "the data")
    if not isinstance(source, str | Path):
        return BatchDataset(source)
    path = Path(source)
    try:
        return ArrayDataset(_read_folder(path) if path.is_dir() else _read_npz(path), str(path))
    except OSError as error:
        raise UnusableData(str(path), error.strerror or str(error)) from error
    except (ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise UnusableData(str(path), f"it cannot be read as arrays: {error}") from error


def check_batch(batch: Batch, specs: Sequence[TensorSpec]) -> None:
    """Check that ``batch`` contains every array in ``specs``, with the declared type and shape.

    Arrays are not converted; if a dtype is wrong, the error explains how to convert the array.

    Raises:
        MissingArray: an array is missing.
        ArrayMismatch: the dtype or shape of an array is wrong.
        ValueOutOfRange: an integer, usually a label, is out of range.
    """
    sizes: dict[str, int] = {}
    for spec in specs:
        if spec.name not in batch:
            raise MissingArray(spec.name, tuple(batch))
        array = batch[spec.name]
        dtype = DTYPES[spec.dtype]
        if array.dtype != dtype:
            advice = f"convert it with .astype('{dtype.name}')"
            raise ArrayMismatch(spec.name, str(spec), f"{describe(array)}; {advice}")
        try:
            check_array(array, spec, sizes)
        except ArrayMismatch as error:
            raise _explain_rows(error, array, spec) from error


def _explain_rows(error: ArrayMismatch, array: np.ndarray, spec: TensorSpec) -> ArrayMismatch:
    """Advise where to look, if the number of rows is one that the model does not take."""
    declared = spec.shape[0] if spec.shape else None
    if not array.ndim or declared is None:
        return error
    if isinstance(declared, str):
        fewest = _count_fewest(declared)
        if array.shape[0] >= fewest:
            return error
        advice = f"the model was cut for {fewest} rows or more; `splitonnx check` says why"
        return ArrayMismatch(error.name, error.expected, f"{error.actual}; {advice}")
    try:
        check_array(array, _any_rows(spec), {})
    except DataError:
        return error
    advice = "the model fixes its number of rows; `splitonnx check` says where"
    return ArrayMismatch(error.name, error.expected, f"{error.actual}; {advice}")


def _count_fewest(dim: str) -> int:
    """Return the least size of a symbolic dimension whose names stand for at least 1."""
    terms = parse_terms(dim)
    return sum(factor for _, factor in terms) if all(factor > 0 for _, factor in terms) else 1


def check_finite(batch: Batch, where: str, rows: np.ndarray | None = None) -> None:
    """Check that the floating-point arrays of a batch contain neither NaN nor infinity.

    ``where`` is placed before the row number in the error message.  ``rows`` contains, for each row
    of the batch, its number in the dataset; by default, rows are counted within the batch.

    Raises:
        NotFinite: an array contains NaN or infinity; the error names the array and the first
            affected row.
    """
    for name, array in batch.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(np.atleast_1d(array)))[0, 0])
            raise NotFinite(name, f"{where}row {row if rows is None else rows[row]}")


def _any_rows(spec: TensorSpec) -> TensorSpec:
    if spec.shape and isinstance(spec.shape[0], int):
        return msgspec.structs.replace(spec, shape=(None, *spec.shape[1:]))
    return spec


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if path.suffix != ".npz":
        raise UnusableData(str(path), "data are an .npz file or a folder of .npy files")
    with open(open_regular(path), "rb") as file:
        _check_room(file)
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise UnusableData(str(path), "it is a single array, without a name; use np.savez")
        return dict(archive)


def _check_room(file: BinaryIO) -> None:
    """Raise an error if an archive's arrays, all of which are loaded, do not fit into memory."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > measure_memory():
            reason = f"its arrays take {size / 1e9:.1f} GB, more than this machine's memory"
            raise ValueError(f"{reason}; save them as a folder of .npy files")
    file.seek(0)


def _read_folder(path: Path) -> dict[str, np.ndarray]:
    return {file.stem: _map_array(file) for file in sorted(path.glob("*.npy"))}


def _map_array(path: Path) -> np.ndarray:
    os.close(open_regular(path))
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
