"""Errors in the input: data, bundles and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitonnx.errors.roots import SplitonnxError, flatten, name_tensor, quote


class DataError(SplitonnxError):
    """The data for training or prediction do not fit the model."""


@dataclass(eq=False)
class MissingArray(DataError):
    """The data do not contain an array that the model needs."""

    name: str
    present: Sequence[str]

    def __str__(self) -> str:
        return f"the data have no array '{self.name}'; they hold {quote(self.present) or 'none'}"


@dataclass(eq=False)
class KeptArray(DataError):
    """The data contain an array for a tensor that the model keeps itself."""

    name: str

    def __str__(self) -> str:
        return (
            f"the data have an array '{self.name}', but the model keeps this tensor itself, from "
            "step to step, so its values would not be read; leave it out of the data (as --state, "
            "it begins with the initializer of this name in the model's file, if there is one)"
        )


@dataclass(eq=False)
class ArrayMismatch(DataError):
    """An array, or a tensor in a message, does not have the declared dtype or shape."""

    name: str
    expected: str
    actual: str

    def __str__(self) -> str:
        return f"{name_tensor(self.name)} should be {self.expected}, but is {self.actual}"


@dataclass(eq=False)
class ValueOutOfRange(DataError):
    """An array, usually the labels, contains a value outside its declared range."""

    name: str
    value: float
    lower: int
    upper: int
    other: int | None = None

    def __str__(self) -> str:
        other = "" if self.other is None else f", and {self.other}"
        allowed = f"allowed are {self.lower} to {self.upper - 1}{other}"
        return f"{name_tensor(self.name)} holds {self.value}; {allowed}"


@dataclass(eq=False)
class BatchTooLarge(DataError):
    """A tensor in a message was rejected because it has more rows than the receiver allows."""

    name: str
    rows: int
    limit: int

    def __str__(self) -> str:
        return (
            f"{name_tensor(self.name)} has {self.rows} rows, over the server's limit of "
            f"{self.limit}; use a smaller --batch-size, or serve with a larger --max-batch"
        )


@dataclass(eq=False)
class TaskTooLarge(DataError):
    """A task was not started because it needs more memory than the server allows.

    The server's limit applies to all tasks together.
    """

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
    """A tensor contains NaN or infinity."""

    name: str
    where: str

    def __str__(self) -> str:
        where = f"holds NaN or infinity ({self.where})"
        return f"{name_tensor(self.name)} {where}; nothing was updated with it"


@dataclass(eq=False)
class NormTooLarge(DataError):
    """A gradient's norm exceeds the limit that protects against poisoned gradients."""

    name: str
    norm: float
    limit: float

    def __str__(self) -> str:
        return (
            f"{name_tensor(self.name)} has the norm {self.norm:g}, over the limit of "
            f"{self.limit:g}; nothing was updated with it"
        )


@dataclass(eq=False)
class UnusableData(DataError):
    """The file or iterable that was given as data does not provide usable arrays."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass(eq=False)
class BundleError(SplitonnxError):
    """A bundle's folder is missing, incomplete or altered, or cannot be written."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(eq=False)
class FolderInUse(SplitonnxError):
    """A party's folder is already being served or trained.

    ``process`` is the ID of the process that is using the folder, or ``None`` if it is unknown.
    ``is_own`` means that this process is using it.
    """

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
    """A checkpoint cannot be written, for example because the disk is full."""

    path: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.path} cannot be written: {self.reason}; what was saved before it is kept, but "
            "training since then is not saved"
        )


class StateNotFinite(NotSaved):
    """A state contains NaN or infinity, so training cannot continue from it."""

    def __init__(self, path: str, name: str) -> None:
        super().__init__(
            path,
            f"'{name}' holds NaN or infinity; train again from an earlier state with a lower "
            "learning rate",
        )


class DiskQuotaUsed(NotSaved):
    """The checkpoints and outcomes of an owner have used up the owner's disk quota."""

    def __init__(self, path: str, limit: int, used: int) -> None:
        super().__init__(
            path,
            f"this owner's checkpoints and outcomes take {used} bytes of the {limit} that they "
            "may take (--max-disk-per-owner)",
        )


@dataclass(eq=False)
class ForbiddenGraph(SplitonnxError):
    """A stage's graph was not run because it is malformed or contains something forbidden."""

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
    """A file, message or tensor does not have the expected format.

    For example, a tensor file is not valid safetensors, a manifest is not valid JSON or lacks a
    field, or a tensor has an element type that cannot be encoded.
    """

    subject: str
    reason: str

    def __str__(self) -> str:
        return f"{self.subject}: {flatten(self.reason)}"


@dataclass(eq=False)
class NotExportable(SplitonnxError):
    """A stage of ``party`` needs operators that ONNX Runtime's mobile packages do not have."""

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
    """An output file cannot be written, for example because it exists already."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} cannot be written: {self.reason}"


@dataclass(eq=False)
class UnfinishedRun(SplitonnxError):
    """A new training run cannot start because an earlier run in its folder was interrupted."""

    path: str
    step: int

    def __str__(self) -> str:
        return (
            f"{self.path}: training was interrupted at step {self.step}; continue with --resume, "
            "or give that run up with --restart"
        )
