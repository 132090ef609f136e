"""Datasets: named arrays that are checked and split into batches.

The arrays are checked against the tensors that the manifest declares for a phase.  The outputs of
several batches are joined again.  This module does not interpret the contents of the arrays.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from splitonnx.errors import (
    ArrayMismatch,
    DataError,
    KeptArray,
    MissingArray,
    NotFinite,
    UnusableData,
    UsageError,
)
from splitonnx.expressions import parse_terms
from splitonnx.runtime.client.array_files import (
    list_batch_files,
    map_folder,
    read_declared,
    read_npz,
)
from splitonnx.tensors import DTYPES, TensorSpec, check_array, describe

_EMPTY = """nothing is computed from an array without elements, such as the labels of a Loop \
without an iteration; leave this batch out of the data"""
Batch: TypeAlias = Mapping[str, np.ndarray]
DataSource: TypeAlias = "str | Path | Batch | Iterable[Batch] | Dataset"


class Dataset(ABC):
    """A dataset of named arrays that is read in batches; created by :func:`open_dataset`."""

    size: int | None
    """Number of samples, or of batches if ``has_own_batches``; ``None`` if it is not known."""
    has_own_batches = False
    """Whether the data determine the size of each batch, so that ``batch_size`` is ignored."""

    @abstractmethod
    def check(self, specs: Sequence[TensorSpec], kept: Collection[str] = ()) -> None:
        """Check the arrays against ``specs``, the declared tensors.

        ``kept`` names tensors that the model keeps itself.  Batches of an iterable that is not a
        list are checked later, when they are read.

        Raises:
            KeptArray, MissingArray, ArrayMismatch, ValueOutOfRange: see :func:`check_batch`.
            UnusableData: a file of a folder with one file per batch does not fit.
        """

    def count_batches(self, batch_size: int, *, drop_last: bool = False) -> int | None:
        """Return the number of batches in an epoch, or ``None`` if it is not known."""
        if self.size is None or self.has_own_batches:
            return self.size
        return self.size // batch_size if drop_last else math.ceil(self.size / batch_size)

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
        """Yield the batches of one epoch.

        If ``shuffle`` is true, ``seed`` and ``epoch`` determine the order.  If the number of
        samples is not a multiple of ``batch_size``, the last batch is smaller; ``drop_last`` means
        that this smaller batch is skipped.

        Raises:
            NotFinite: a floating-point array of the next batch contains NaN or infinity.
            UnusableData: the data come from an iterator that an earlier call has used up, the next
                batch is not a dictionary of arrays, or its file cannot be read or does not fit.
            MissingArray, ArrayMismatch, ValueOutOfRange: the next batch of an iterable does not fit
                the model.
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
            cause = f"its arrays differ in their number of rows: {counts}"
            raise UnusableData(source, f"{cause}; save each batch as one .npz file in a folder")
        self.size = next(iter(rows.values()))
        if self.size == 0:
            raise UnusableData(source, "it holds no samples")
        self._arrays = arrays

    def check(self, specs: Sequence[TensorSpec], kept: Collection[str] = ()) -> None:
        """Check the type, shape and values of every array; any number of rows is allowed."""
        check_batch(self._arrays, [_any_rows(spec) for spec in specs], kept)

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
        order = _choose_order(self.size, seed, epoch, shuffle)
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
    has_own_batches = True

    def __init__(self, source: Iterable[Batch]) -> None:
        self._source = source
        self._specs: Sequence[TensorSpec] = ()
        self._kept: Collection[str] = ()
        self._spent = False

    def check(self, specs: Sequence[TensorSpec], kept: Collection[str] = ()) -> None:
        """Check the batches of a list; other batches are checked when they are read."""
        self._specs, self._kept = specs, kept
        if isinstance(self._source, list | tuple):
            for number, batch in enumerate(self._source):
                check_batch(_read_batch(number, batch), specs, kept)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches of the iterable; all arguments are ignored.

        Raises:
            UnusableData: the iterable is an iterator, which an earlier epoch has used up; or the
                next batch is not a dictionary of arrays.
            MissingArray, ArrayMismatch, ValueOutOfRange, NotFinite: the next batch does not fit the
                model, or contains NaN or infinity.
        """
        if self._spent:
            raise UnusableData(
                "the data", "an iterator lasts for one epoch; pass a list or a dataset"
            )
        self._spent = isinstance(self._source, Iterator)
        for number, batch in enumerate(self._source):
            arrays = _read_batch(number, batch)
            check_batch(arrays, self._specs, self._kept)
            check_finite(arrays, f"batch {number}, ")
            yield arrays


def _read_batch(number: int, batch: object) -> dict[str, np.ndarray]:
    if not isinstance(batch, Mapping):
        kind = type(batch).__name__
        raise UnusableData("the data", f"batch {number} is a {kind}, no dict of arrays")
    return {name: np.asarray(array) for name, array in batch.items()}


class FileDataset(Dataset):
    """A dataset of ``.npz`` files, each of which contains one batch.

    The sizes of the batches may differ in every dimension that the model leaves open.  Only one
    file at a time is in memory.
    """

    size: int
    has_own_batches = True

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.size = len(files)
        self._specs: Sequence[TensorSpec] = ()
        self._kept: Collection[str] = ()

    def check(self, specs: Sequence[TensorSpec], kept: Collection[str] = ()) -> None:
        """Check the arrays in every file against ``specs``, the declared tensors.

        Arrays are read in full only if bounds are declared for their values; for all others, only
        the headers are read.  Each file is checked again when its batch is read.
        """
        self._specs, self._kept = specs, kept
        for file in self.files:
            with _naming(file):
                check_batch(read_declared(file, specs), specs, kept)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield one batch per file; ``seed`` and ``epoch`` determine the shuffled order.

        ``batch_size`` and ``drop_last`` are ignored.
        """
        for number in _choose_order(self.size, seed, epoch, shuffle):
            file = self.files[int(number)]
            with _naming(file):
                batch = read_npz(file)
                check_batch(batch, self._specs, self._kept)
            check_finite(batch, f"{file}, ")
            yield batch


def _choose_order(size: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Return the numbers below ``size``, in the shuffled order that seed and epoch determine."""
    order = np.arange(size)
    if shuffle:
        np.random.default_rng([seed, epoch]).shuffle(order)
    return order


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Name the file in errors about its arrays."""
    try:
        yield
    except UnusableData:
        raise
    except DataError as error:
        raise UnusableData(str(file), str(error)) from error


def open_dataset(source: DataSource) -> Dataset:
    """Create a dataset from an ``.npz`` file, a folder, named arrays, or batches.

    The arrays must have the names of the model's inputs; the array of targets is named ``labels``.
    Each array has one row per sample.  The files in a folder are either ``.npy`` files with one
    array each, which are memory-mapped and read as needed, or ``.npz`` files with one batch each,
    in the order of their names.  Batches can also be passed as an iterable of dictionaries of
    arrays.  Files and iterables of batches determine the size of each batch, and an iterable also
    determines the order.  If ``source`` is already a dataset, it is returned unchanged.

    Raises:
        UnusableData: a file cannot be read or contains Python objects, the arrays differ in their
            number of rows, or a folder contains both kinds of files.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, Mapping):
        arrays = {name: np.asarray(array) for name, array in source.items()}
        return ArrayDataset(arrays, "the data")
    if not isinstance(source, str | Path):
        return BatchDataset(source)
    path = Path(source)
    if files := list_batch_files(path):
        return FileDataset(files)
    return ArrayDataset(map_folder(path) if path.is_dir() else read_npz(path), str(path))


def check_batch(batch: Batch, specs: Sequence[TensorSpec], kept: Collection[str] = ()) -> None:
    """Check that ``batch`` contains every array in ``specs``, with the declared type and shape.

    Arrays are not converted; if a dtype is wrong, the error explains how to convert the array.
    ``kept`` names tensors that the model keeps itself, of which ``batch`` must have none.

    Raises:
        KeptArray: there is an array for a tensor that the model keeps itself.
        MissingArray: an array is missing.
        ArrayMismatch: the dtype or shape of an array is wrong.
        ValueOutOfRange: an integer, usually a label, is out of range.
    """
    for name in kept:
        if name in batch:
            raise KeptArray(name)
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
            raise _explain_classes(_explain_rows(error, array, spec), array, spec) from error


def _explain_rows(error: ArrayMismatch, array: np.ndarray, spec: TensorSpec) -> ArrayMismatch:
    """Advise where to look, if the number of rows is one that the model does not take."""
    declared = spec.shape[0] if spec.shape else None
    if array.shape and not array.size and 0 not in spec.shape:
        return ArrayMismatch(error.name, error.expected, f"{error.actual}; {_EMPTY}")
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


def _explain_classes(error: ArrayMismatch, array: np.ndarray, spec: TensorSpec) -> ArrayMismatch:
    """Advise on the axis of the classes, if labels have another shape beside their rows."""
    is_beside = spec.bounds is not None and len(spec.shape) > 1  # only class labels have bounds
    if not is_beside or not array.ndim or array.shape[1:] == spec.shape[1:]:
        return error
    advice = (
        "if the classes of the model's scores are on another axis, cut it with --class-axis AXIS"
    )
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


def join_outputs(
    batches: Iterable[Mapping[str, np.ndarray]], axes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Join the outputs of all batches, each along its axis of ``axes``, by default axis 0.

    A single number per batch becomes an array with one number for each batch.

    Raises:
        UsageError: an output's batches differ in another dimension, too.
    """
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for outputs in batches:
        for name, array in outputs.items():
            parts[name].append(np.atleast_1d(array))
    for name, arrays in parts.items():
        if len({tuple(np.delete(array.shape, axes.get(name, 0))) for array in arrays}) > 1:
            raise UsageError(
                f"the batches' outputs '{name}' differ in more than the dimension of the samples; "
                "take them one by one with predict_batches"
            )
    return {name: np.concatenate(arrays, axes.get(name, 0)) for name, arrays in parts.items()}


def _any_rows(spec: TensorSpec) -> TensorSpec:
    if spec.shape and isinstance(spec.shape[0], int):
        return msgspec.structs.replace(spec, shape=(None, *spec.shape[1:]))
    return spec
