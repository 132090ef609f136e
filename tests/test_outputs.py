"""Outputs that cannot be written: one line, exit code 2, before the work, and nothing is left."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import SplitonnxError, UnwritableFile
from splitonnx.outputs import check_file_place, check_output, check_place
from splitonnx.partitioner.merges import write_merged
from splitonnx.runtime.edge.tokens import add_token
from splitonnx.runtime.server.servers import Server
from tests.commands.conftest import command  # noqa: F401
from tests.support.commands import AT, MODEL, Command

SAMPLES = 4
DISK_BYTES = 196
"""A file may have as many where the disk is to be full: fewer than any output has."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the commands read, made once."""

    bundle: Path
    data: Path
    url: str


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    import splitonnx

    folder = tmp_path_factory.mktemp("inputs")
    splitonnx.cut(MODEL, at=AT, send_labels=True, client_target="portable").save(folder / "bundle")
    image = np.zeros((SAMPLES, 1, 8, 8), np.float32)
    np.savez(folder / "data.npz", image=image, labels=np.zeros(SAMPLES, np.int64))
    with Server(folder / "bundle" / "server", port=0) as server:
        yield Inputs(bundle=folder / "bundle", data=folder / "data.npz", url=server.url)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Make a folder with a file and a folder of the user's in it."""
    (tmp_path / "file").write_text("all of it")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis").write_text("all of it")
    return tmp_path


COMMANDS: Mapping[str, Callable[[Inputs, str], list[object]]] = {
    "cut": lambda _, output: ["cut", MODEL, "--at", AT, "--send-labels", "--force", "-o", output],
    "merge": lambda given, output: ["merge", given.bundle, "--force", "-o", output],
    "export": lambda given, output: [
        "export", given.bundle / "client", "--for", "mobile", "--force", "-o", output,
    ],
    "train --local": lambda given, output: [
        "train", MODEL, "--local", "--data", given.data, "--quiet", "--force", "-o", output,
    ],
    "predict": lambda given, output: [
        "predict", given.bundle / "client", "--data", given.data, "--server", given.url,
        "--force", "-o", output,
    ],
    "token": lambda _, output: ["token", "ann", "--token-file", output],
}  # fmt: skip
PLACES: Mapping[str, tuple[Callable[[Path], str], str]] = {
    "in a file": (lambda place: f"{place}/file/output", "file' is not a folder"),
    "deep in a file": (lambda place: f"{place}/file/a/b/output", "file' is not a folder"),
    "a folder": (lambda place: f"{place}/folder", "Is a directory|not a bundle|not an export"),
    "a device": (lambda _: "/dev/null", "a device, not a regular file|not a bundle|not an export"),
    "too long a name": (lambda place: f"{place}/{'x' * 300}", "its name is too long"),
    "too long a folder": (lambda place: f"{place}/{'x' * 300}/output", "name( of .*)? too long"),
    "too long a path": (lambda place: f"{place}{'/x' * 4000}", "File name too long"),
    "a null byte": (lambda place: f"{place}/a\0b", "null byte"),
    "half a surrogate": (lambda place: f"{place}/a\ud800", "surrogates not allowed"),
    "spaces": (lambda place: f"{place}/ \t ", "it has no name"),
    "nothing": (lambda _: "", "is empty; give it a value"),
    "here": (lambda _: ".", "it has no name"),
    "the root": (lambda _: "/", "it has no name"),
    "where nobody may write": (lambda _: "/proc/output", "No such file|denied|not permitted|may"),
}


def look(place: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


@contextmanager
def with_a_full_disk(nbytes: int = DISK_BYTES) -> Iterator[None]:
    """Let no file grow beyond a size: the system then says EFBIG in place of ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_where_nothing_can_be_written_is_said_in_one_line(
    name: str,
    where: str,
    place: Path,
    inputs: Inputs,
    command: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    before = look(place)
    choose, reason = PLACES[where]
    sentence = command.fail(*COMMANDS[name](inputs, choose(place)))
    assert re.search(reason, sentence), sentence
    assert look(place) == before


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "token"])
def test_folders_that_are_missing_above_an_output_are_made(
    name: str,
    place: Path,
    inputs: Inputs,
    command: Command,  # noqa: F811
) -> None:
    command.succeed(*COMMANDS[name](inputs, f"{place}/a/b/output"))
    assert (place / "a" / "b" / "output").exists()
    assert [path.name for path in (place / "a" / "b").iterdir()] == ["output"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full_leaves_what_was_there_before(
    name: str,
    place: Path,
    inputs: Inputs,
    command: Command,  # noqa: F811
) -> None:
    (place / "file").write_text("# mine\n" * (DISK_BYTES // 7))  # a token's line does not fit
    before = look(place)
    output = place / ("file" if name == "token" else "new")
    with with_a_full_disk():
        sentence = command.fail(*COMMANDS[name](inputs, str(output)))
    said = "Failed to save" if name == "export" else os.strerror(errno.EFBIG)  # ORT's own words
    assert said in sentence
    assert look(place) == before


def test_a_token_s_new_file_goes_where_the_disk_is_full(place: Path) -> None:
    with with_a_full_disk(20), pytest.raises(SplitonnxError, match=os.strerror(errno.EFBIG)):
        add_token(place / "tokens", "ann")
    assert not (place / "tokens").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["check", MODEL], ["check", MODEL, "--json"]])
def test_a_full_disk_under_what_is_printed_is_said_in_one_line(arguments: list[object]) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "splitonnx", *map(str, arguments)],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in ended.stderr


# --- the same from Python ---------------------------------------------------------------------


@pytest.mark.parametrize("where", [where for where in PLACES if where != "where nobody may write"])
def test_the_library_says_it_by_an_error_of_its_own(
    where: str, place: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = look(place)
    target = PLACES[where][0](place)
    bundle = Bundle.load(inputs.bundle)
    for write in (
        lambda: bundle.save(target, overwrite=True),
        lambda: bundle.client.save(target, overwrite=True),
        lambda: write_merged(bundle, target, overwrite=True),
        lambda: add_token(target, "ann"),
    ):
        with pytest.raises(SplitonnxError):
            write()
    assert look(place) == before


def test_a_place_is_looked_at_as_far_down_as_there_are_folders(place: Path) -> None:
    check_place(place / "output")
    check_file_place(place / "file")
    check_place(place / "folder" / "a" / "b" / "output")
    with pytest.raises(NotADirectoryError, match="file' is not a folder"):
        check_place(place / "file" / "a" / "output")
    (place / "link").symlink_to(place / "file")
    with pytest.raises(NotADirectoryError):
        check_place(place / "link" / "output")


def test_a_file_that_is_there_is_replaced_only_when_asked(place: Path) -> None:
    check_output(place / "new", overwrite=False)
    check_output(place / "file", overwrite=True)
    with pytest.raises(UnwritableFile, match="it exists already"):
        check_output(place / "file", overwrite=False)
    with pytest.raises(UnwritableFile, match="is not a folder"):
        check_output(place / "file" / "new", overwrite=True)


def test_a_folder_that_may_not_be_written_to_is_said_before_the_work(
    place: Path,
    command: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    sentence = command.fail("cut", place / "no model", "--at", "x", "-o", place / "folder" / "new")
    assert "folder' may not be written to" in sentence
