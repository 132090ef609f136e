"""Names of checkpoints' files, and the sessions that have some."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitonnx.errors import BundleError
from splitonnx.runtime.storage.checkpoint_files import (
    STEP,
    is_best,
    list_folders,
    list_names,
    list_sessions,
    name_step,
)


@pytest.mark.parametrize("keep", [False, True])
def test_a_name_has_the_step_and_whether_training_may_return_to_it(keep: bool) -> None:
    name = name_step(120, keep=keep)
    match = STEP.fullmatch(name)
    assert match is not None
    assert (match[1], is_best(Path(name))) == ("120", keep)


@pytest.mark.parametrize(
    "name", ["012.safetensors", "1.worst.safetensors", "1.best.best.safetensors", "1.best", "x"]
)
def test_other_files_are_no_checkpoints(name: str) -> None:
    assert STEP.fullmatch(name) is None


def test_sessions_come_most_recently_written_first(tmp_path: Path) -> None:
    for number, session in enumerate(("a" * 32, "b" * 32, "c" * 32)):
        folder = tmp_path / "sessions" / session
        folder.mkdir(parents=True)
        if session[0] != "c":
            path = folder / name_step(1, keep=number == 1)
            path.write_bytes(b"")
            os.utime(path, ns=(number, number))
    (tmp_path / "sessions" / "other").mkdir()
    assert list_sessions(tmp_path) == ("b" * 32, "a" * 32)
    assert sorted(list_folders(tmp_path)) == ["a" * 32, "b" * 32, "c" * 32]


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    assert list_names(tmp_path / "missing") == []
    link = tmp_path / "link"
    link.symlink_to(link)
    with pytest.raises(BundleError, match="cannot be read"):
        list_names(link)
