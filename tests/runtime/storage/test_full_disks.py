"""A checkpoint that cannot be written says why, leaves the earlier ones and nothing of itself."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from splitonnx.errors import NotSaved
from tests.conftest import ROOT
from tests.support.checkpoint_kills import SESSION, make_checkpoint, open_store
from tests.support.full_disk_trainings import Course
from tests.support.full_disks import Outcome


def write_steps(folder: Path, *steps: int) -> None:
    for step in steps:
        open_store(folder).write(make_checkpoint(step))


def assert_untouched(folder: Path, *steps: int) -> None:
    assert open_store(folder).steps() == steps
    for step in steps:
        found, written = open_store(folder).read(step).tensors, make_checkpoint(step).tensors
        assert all(found[name].tobytes() == array.tobytes() for name, array in written.items())
    left = sorted(path.name for path in (folder / "sessions" / SESSION).iterdir())
    assert left == sorted(f"{step}.safetensors" for step in steps)


def run_alone(module: str, folder: Path) -> str:
    """Run a module that may mount file systems; return what it printed."""
    if shutil.which("unshare") is None:
        pytest.skip("NOT TESTED: a really full disk needs unshare")
    alone = ["unshare", "--map-root-user", "--mount"]
    mount = [*alone, "mount", "-t", "tmpfs", "none", str(folder)]
    if (tried := subprocess.run(mount, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"NOT TESTED: no file system can be mounted here: {tried.stderr}")
    command = [*alone, sys.executable, "-m", module, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_disk_that_is_really_full_or_read_only_costs_the_new_checkpoint_alone(
    tmp_path: Path,
) -> None:
    printed = run_alone("tests.support.full_disks", tmp_path)
    outcomes = msgspec.json.decode(printed, type=dict[str, Outcome])
    assert all(outcome.are_equal for outcome in outcomes.values())
    assert outcomes.pop("room again") == Outcome(
        reason="",
        steps=(30, 20),
        are_equal=True,
        names=("20.safetensors", "30.safetensors"),
    )
    first = outcomes.pop("first, full")
    assert (first.steps, first.names) == ((), ())
    assert "Read-only file system" in outcomes.pop("read-only").reason
    assert len(outcomes) == 4
    for outcome in (first, *outcomes.values()):
        assert "safetensors cannot be written: No space left on device; what was" in outcome.reason
    for outcome in outcomes.values():
        assert outcome.steps == (20, 10)
        assert outcome.names == ("10.safetensors", "20.safetensors")


def test_on_a_full_disk_training_stops_or_goes_on_and_ends_with_the_same_weights(
    tmp_path: Path,
) -> None:
    printed = run_alone("tests.support.full_disk_trainings", tmp_path)
    courses = msgspec.json.decode(printed, type=dict[str, Course])
    assert courses["stop"].error == (
        "the server's folder cannot be written: No space left on device; what was saved before it "
        "is kept, but training since then is not saved"
    )
    assert courses["stop"].steps_made == 4
    assert courses["stop, resumed"] == Course(error="", steps_made=4, is_equal=True)
    assert courses["continue"] == Course(error="", steps_made=6, is_equal=True)
    assert "No space left on device" in courses["end"].error
    assert courses["end, resumed"] == Course(error="", steps_made=2, is_equal=True)


@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
@pytest.mark.parametrize("stopped", [False, True])
def test_whatever_call_fails_the_earlier_checkpoints_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, stopped: bool
) -> None:
    reasons = set()
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_steps(folder, 10, 20)
        reason = write_failing(folder, monkeypatch, function, number, stopped)
        steps = {*open_store(folder).steps()}
        if not reason:  # no call of that number, or one that only looks at what is there
            assert {30, 20} <= steps
        else:
            assert "No space left on device" in reason
            # the new one may stand too, where only its folder could not be synced
            assert {20, 10} <= steps <= {30, 20, 10}
        reasons.add(reason)
        if reason is None:
            break
    assert reasons - {"", None}


def write_failing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, stopped: bool
) -> str | None:
    """Write while the call of that number finds no space; return what was said of it.

    ``None``: there was no such call.
    """
    whole: Callable[..., object] = getattr(os, function)
    calls = itertools.count(1)
    failed = []

    def fail(*args: object) -> object:
        if next(calls) == number:
            failed.append(number)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*args)

    store = open_store(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        try:
            (store.write_stopped if stopped else store.write)(make_checkpoint(30))
        except NotSaved as error:
            return str(error)
    return "" if failed else None


def test_a_file_that_may_not_grow_that_large_is_named(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    write_steps(tmp_path, 10, 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(NotSaved, match=r"30\.safetensors cannot be written: File too large"):
            open_store(tmp_path).write(make_checkpoint(30))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_untouched(tmp_path, 20, 10)
    write_steps(tmp_path, 30)
    assert_untouched(tmp_path, 30, 20)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, 10, 20)
    place = tmp_path / "sessions" / SESSION
    place.chmod(0o500)
    try:
        with pytest.raises(NotSaved, match="Permission denied"):
            open_store(tmp_path).write(make_checkpoint(30))
    finally:
        place.chmod(0o700)
    assert_untouched(tmp_path, 20, 10)
