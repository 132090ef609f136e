"""A bundle that is overwritten is the old one or the new one, wherever the writer is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from splitonnx import atomic
from splitonnx.atomic import append_line, clear_unfinished, exchange, replace_file, replacing
from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import BundleError, FolderInUse
from splitonnx.folder_locks import FolderLock
from tests.conftest import ROOT
from tests.support import tiny
from tests.support.folder_kills import find_content, replace
from tests.support.folder_states import list_left

LIMIT = 300
"""Seconds for all kills; a tenth of it is usual."""


def kill_everywhere(folder: Path, way: str) -> tuple[list[Path], int]:
    """Return what each kill left, in order, and how many stops the process had without one."""
    if sys.platform != "linux":
        pytest.skip("NOT TESTED: kills at every system call need Linux's ptrace")
    command = [sys.executable, "-m", "tests.support.folder_kills", str(folder), way]
    single = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # a process of several does not fork well
    done = subprocess.run(
        command, cwd=ROOT, env=single, capture_output=True, text=True, check=False, timeout=LIMIT
    )
    if "TracingRefused" in done.stderr:
        pytest.skip("NOT TESTED: kills at every system call, for ptrace is not permitted here")
    assert done.returncode == 0, done.stderr
    return list_left(folder), int(done.stdout)


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_kill_at_any_system_call_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, way: str
) -> None:
    left, stops = kill_everywhere(tmp_path, way)
    assert stops > 50
    assert len(left) > 5
    if way == "exchange" and can_exchange(tmp_path):
        assert all((folder / "target").is_dir() for folder in left)  # at its place at any moment
    seen = [find_content(folder) for folder in left]
    assert seen == sorted(seen, reverse=True)  # old, then new, and no way back
    assert {*seen} == {"old", "new"}
    for folder in left:
        replace(folder, "newer")
        assert find_content(folder) == "newer"
        assert [path.name for path in folder.iterdir()] == ["target"]
        assert {path.name for path in (folder / "target").iterdir()} == {"manifest.json", "content"}


def can_exchange(folder: Path) -> bool:
    names = [folder / "one", folder / "other"]
    for name in names:
        name.mkdir()
    return exchange(*names)


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    process = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(process, 0)
    return process


@pytest.mark.parametrize("load", [Bundle.load, lambda place: PartyBundle.load(place / "client")])
def test_a_bundle_that_a_killed_process_moved_aside_is_found_again(
    tmp_path: Path, ended: int, load: type[object]
) -> None:
    tiny.split_bundle().save(tmp_path / "bundle")
    os.rename(tmp_path / "bundle", tmp_path / f".bundle.{ended}.previous")
    load(tmp_path / "bundle")  # type: ignore[call-arg]
    with pytest.raises(BundleError, match="exists already"):
        tiny.local_bundle().save(tmp_path / "bundle")


def test_what_a_living_process_moves_aside_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f".bundle.{os.getppid()}.previous").mkdir()
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.load(tmp_path / "bundle")
    tiny.split_bundle().save(tmp_path / "bundle")
    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    tiny.local_bundle().save(tmp_path / "bundle", overwrite=True)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_bundle_in_use_is_not_overwritten(tmp_path: Path) -> None:
    tiny.split_bundle().save(tmp_path / "bundle")
    lock = FolderLock.acquire(tmp_path / "bundle" / "server")
    with pytest.raises(FolderInUse):
        tiny.local_bundle().save(tmp_path / "bundle", overwrite=True)
    assert Bundle.load(tmp_path / "bundle").server is not None
    lock.release()
    tiny.local_bundle().save(tmp_path / "bundle", overwrite=True)
    assert Bundle.load(tmp_path / "bundle").server is None


def test_what_a_living_process_writes_is_never_cleared_away(tmp_path: Path) -> None:
    ended = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(ended, 0)
    mine = tmp_path / "state.safetensors"
    left = [".fresh.state.safetensors", f".7.safetensors.{ended}", f".7.safetensors.{ended}-1"]
    stays = [f".7.safetensors.{os.getppid()}-1", ".notes.2024", "7.safetensors"]
    for name in (*left, *stays, f".8.safetensors.{os.getpid()}-1"):
        (tmp_path / name).touch()
    with replacing(mine) as fresh:
        fresh.touch()
        clear_unfinished(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {fresh.name, *stays}
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, *stays}


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for content in (b"one", b"another"):
        replace_file(path, [content[:2], memoryview(content)[2:]])
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["state"]


def test_a_file_that_cannot_be_written_to_its_end_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state"
    replace_file(path, [b"old"])

    def fail() -> Iterator[bytes]:
        yield b"ne"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_file(path, fail())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_what_ends_a_block_early_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with suppress(KeyboardInterrupt), replacing(path) as fresh:
        fresh.write_bytes(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_line_is_appended_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    append_line(path, b"one\n")
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"one")  # somebody's editor took the end of the line
    append_line(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        append_line(path, b"three\n")
    assert path.read_bytes() == b"one\ntwo\n"
