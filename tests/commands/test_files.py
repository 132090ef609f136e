"""Output files of the commands: whole or not at all, and never over another by accident."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitonnx.commands.files import open_whole, refuse_existing, write_whole_folder
from splitonnx.errors import UnwritableFile


def test_what_exists_is_in_the_way_without_force(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    refuse_existing(path, force=False)
    path.write_bytes(b"kept")
    with pytest.raises(UnwritableFile, match="--force") as caught:
        refuse_existing(path, force=False)
    assert caught.value.path == str(path)
    refuse_existing(path, force=True)
    assert path.read_bytes() == b"kept"  # it is looked at and no more
    with pytest.raises(UnwritableFile):
        refuse_existing(tmp_path, force=False)


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "out.npz"
    with open_whole(path) as file:
        file.write(b"first ")
        assert not path.exists()
        file.write(b"second")
    assert path.read_bytes() == b"first second"
    assert os.listdir(path.parent) == ["out.npz"]


def test_after_an_error_what_was_there_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    path.write_bytes(b"before")

    def break_off() -> None:
        with open_whole(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["out.npz"]


def test_a_place_that_cannot_be_written_is_told_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    path.mkdir()
    with pytest.raises(UnwritableFile) as caught, open_whole(path):
        pass
    assert caught.value.path == str(path)
    assert os.listdir(tmp_path) == ["out.npz"]


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(UnwritableFile, match="No space left on device"),
        open_whole(tmp_path / "out.npz"),
    ):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "new").write_text("new")

    def fail(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    target = tmp_path / "folder"
    with pytest.raises(UnwritableFile, match="No space left"):
        write_whole_folder(target, fail)
    assert not target.exists()
    write_whole_folder(target, write)
    with pytest.raises(UnwritableFile, match="No space left"):
        write_whole_folder(target, fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert (target / "new").read_text() == "new"
