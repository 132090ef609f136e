"""Errors of what a run is given: its data, its bundles and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitonnx.errors.roots import SplitonnxError, flatten, quote


class DataError(SplitonnxError):
    """The training or prediction data do not fit the model."""


@dataclass(eq=False)
class MissingArray(DataError):
    """The data lack an array that the model needs."""

    name: str
    present: Sequence[str]

    def __str__(self) -> str:
        return f"the data have no array '{self.name}'; they hold {quote(self.present) or 'none'}"


@dataclass(eq=False)
class ArrayMismatch(DataError):
    """An array, or a tensor on the wire, differs from its declaration in dtype or shape."""

    name: str
    expected: str
    actual: str

    def __str__(self) -> str:
        return f"'{self.name}' should be {self.expected}, but is {self.actual}"


@dataclass(eq=False)
class ValueOutOfRange(DataError):
    """An integer array, labels as a rule, holds a value outside its declared range."""

    name: str
    value: int
    lower: int
    upper: int

    def __str__(self) -> str:
        return f"'{self.name}' holds {self.value}; allowed are {self.lower} to {self.upper - 1}"


@dataclass(eq=False)
class BatchTooLarge(DataError):
    """A message's tensor has more rows than its receiver takes; nothing was computed with it."""

    name: str
    rows: int
    limit: int

    def __str__(self) -> str:
        return (
            f"'{flatten(self.name)}' has {self.rows} rows, over the server's limit of "
            f"{self.limit}; use a smaller --batch-size, or serve with a larger --max-batch"
        )


@dataclass(eq=False)
class TaskTooLarge(DataError):
    """A task would need more memory than the server gives to all of them; it was not begun."""

    needed: int
    limit: int

    def __str__(self) -> str:
        return (
            f"the task needs {self.needed / (1 << 20):.0f} MiB of memory by the server's estimate, "
            f"over its limit of {self.limit / (1 << 20):.0f} MiB; use a smaller --batch-size, or "
            "serve with a larger --max-task-bytes"
        )


@dataclass(eq=False)
class NotFinite(DataError):
    """A tensor holds NaN or infinity."""

    name: str
    where: str

    def __str__(self) -> str:
        return f"'{self.name}' holds NaN or infinity ({self.where}); nothing was updated with it"


@dataclass(eq=False)
class NormTooLarge(DataError):
    """A gradient is larger than the limit that was set against poisoned ones."""

    name: str
    norm: float
    limit: float

    def __str__(self) -> str:
        return (
            f"the gradient '{self.name}' has the norm {self.norm:g}, over the limit of "
            f"{self.limit:g}; nothing was updated with it"
        )


@dataclass(eq=False)
class UnusableData(DataError):
    """The data's file or iterable itself cannot be read as arrays."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass(eq=False)
class BundleError(SplitonnxError):
    """A bundle's folder is missing, incomplete, altered, or in the way."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(eq=False)
class FolderInUse(SplitonnxError):
    """A party's folder is served or trained already; ``process`` holds it, if that is known."""

    path: str
    process: int | None
    is_own: bool = False

    def __str__(self) -> str:
        if self.is_own:
            return (
                f"{self.path} is in use by another server or client of this process; close that "
                "one first"
            )
        holder = "another process" if self.process is None else f"process {self.process}"
        return (
            f"{self.path} is in use by {holder}, which serves or trains it; stop that one first, "
            "or use a copy of the folder"
        )


@dataclass(eq=False)
class NotSaved(SplitonnxError):
    """A checkpoint cannot be written: the disk is full, the folder read-only, or the like."""

    path: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.path} cannot be written: {self.reason}; what was saved before it is kept, but "
            "training since then is not saved"
        )


class StateNotFinite(NotSaved):
    """A state holds NaN or infinity, so that training cannot continue from it."""

    def __init__(self, path: str, name: str) -> None:
        super().__init__(
            path,
            f"'{name}' holds NaN or infinity; train again from an earlier state with a lower "
            "learning rate",
        )


class DiskQuotaUsed(NotSaved):
    """An owner's checkpoints and outcomes take all the bytes that they may take on disk."""

    def __init__(self, path: str, limit: int, used: int) -> None:
        super().__init__(
            path,
            f"this owner's checkpoints and outcomes take {used} bytes of the {limit} that they "
            "may take (--max-disk-per-owner)",
        )


@dataclass(eq=False)
class ForbiddenGraph(SplitonnxError):
    """A stage's graph is malformed, or holds what no bundle does; ONNX Runtime never saw it."""

    stage: str
    subject: str
    reason: str

    def __str__(self) -> str:
        return (
            f"the graph of stage '{self.stage}' is not run, {self.subject}: {self.reason}; "
            "take a bundle as `splitonnx cut` wrote it"
        )


@dataclass(eq=False)
class FormatError(SplitonnxError):
    """Bytes that should be tensors in the safetensors layout, or JSON of ours, are not."""

    subject: str
    reason: str

    def __str__(self) -> str:
        return f"{self.subject}: {flatten(self.reason)}"


@dataclass(eq=False)
class NotExportable(SplitonnxError):
    """A stage of ``party`` needs operators that the ONNX Runtime of a phone lacks."""

    graph: str
    operators: Sequence[str]
    party: str

    def __str__(self) -> str:
        return (
            f"'{self.graph}' has training operators that ONNX Runtime's mobile packages lack, "
            f"{', '.join(self.operators)}; cut the model with --{self.party}-target portable"
        )


@dataclass(eq=False)
class UnwritableFile(SplitonnxError):
    """An output file cannot be written, or something is in its place."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} cannot be written: {self.reason}"


@dataclass(eq=False)
class UnfinishedRun(SplitonnxError):
    """Training in this folder was interrupted, and another run is about to begin."""

    path: str
    step: int

    def __str__(self) -> str:
        return (
            f"{self.path}: training was interrupted at step {self.step}; continue with --resume, "
            "or give that run up with --restart"
        )
