"""Errors of what a run is given: each names what was wrong, where, and what to do."""

from __future__ import annotations

import pytest

from splitonnx.errors import (
    ArrayMismatch,
    BatchTooLarge,
    BundleError,
    DataError,
    DiskQuotaUsed,
    FolderInUse,
    ForbiddenGraph,
    FormatError,
    MissingArray,
    NormTooLarge,
    NotExportable,
    NotFinite,
    NotSaved,
    SplitonnxError,
    StateNotFinite,
    TaskTooLarge,
    UnfinishedRun,
    UnusableData,
    UnwritableFile,
    ValueOutOfRange,
)
from tests.support.sentences import check_sentence


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (MissingArray("labels", ("x", "y")), ("'labels'", "'x', 'y'")),
        (ArrayMismatch("x", "F32[N, 3]", "F32[4, 2]"), ("'x'", "F32[N, 3]", "F32[4, 2]")),
        (ValueOutOfRange("labels", 10, 0, 10), ("'labels'", 10, "0 to 9")),
        (BatchTooLarge("x", 9, 8), ("'x'", "9 rows", 8, "--batch-size", "--max-batch")),
        (TaskTooLarge(3 << 20, 2 << 20), ("3 MiB", "2 MiB", "--max-task-bytes")),
        (NotFinite("loss", "step 3"), ("'loss'", "step 3")),
        (NormTooLarge("w", 5.0, 4.0), ("'w'", "norm 5", "limit of 4")),
        (UnusableData("a.npz", "it is empty"), ("a.npz", "it is empty")),
        (BundleError("bundle", "no manifest"), ("bundle", "no manifest")),
        (NotSaved("folder", "the disk is full"), ("folder", "the disk is full")),
        (StateNotFinite("folder", "W2"), ("folder", "'W2'", "learning rate")),
        (DiskQuotaUsed("folder", 100, 90), ("90 bytes", 100, "--max-disk-per-owner")),
        (ForbiddenGraph("s", "node 'n'", "no such thing"), ("'s'", "node 'n'", "no such thing")),
        (FormatError("a manifest", "no JSON"), ("a manifest", "no JSON")),
        (NotExportable("g", ("ConvGrad",), "client"), ("'g'", "ConvGrad", "--client-target")),
        (UnwritableFile("out.npz", "read-only"), ("out.npz", "read-only")),
        (UnfinishedRun("bundle", 7), ("bundle", 7, "--resume", "--restart")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_sentence_holds_the_facts_and_the_next_thing_to_try(
    error: SplitonnxError, facts: tuple[object, ...]
) -> None:
    check_sentence(error, *facts)


def test_data_without_arrays_hold_none() -> None:
    check_sentence(MissingArray("x", ()), "'x'", "none")


def test_who_holds_a_folder_is_told_as_far_as_it_is_known() -> None:
    check_sentence(FolderInUse("bundle", 4711), "bundle", "process 4711")
    check_sentence(FolderInUse("bundle", None), "bundle", "another process")
    check_sentence(FolderInUse("bundle", 4711, is_own=True), "bundle", "this process")
    assert "4711" not in str(FolderInUse("bundle", 4711, is_own=True))


@pytest.mark.parametrize("error", [StateNotFinite("f", "W"), DiskQuotaUsed("f", 2, 1)])
def test_whatever_keeps_a_checkpoint_from_disk_is_caught_as_one(error: NotSaved) -> None:
    assert isinstance(error, NotSaved)
    assert error.path == "f"


def test_whatever_is_wrong_with_data_is_caught_as_one() -> None:
    assert issubclass(BatchTooLarge, DataError)
    assert issubclass(NotFinite, DataError)
    assert not issubclass(BundleError, DataError)


@pytest.mark.parametrize("error", [FormatError("x", "a\nb"), BatchTooLarge("a\nb", 2, 1)])
def test_names_that_others_chose_cannot_break_the_line(error: SplitonnxError) -> None:
    assert str(error).isprintable()
