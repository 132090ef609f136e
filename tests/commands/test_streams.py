"""Commands whose standard streams are closed: one line where it can be read, and exit code 2."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from splitonnx.commands.streams import explain_failed_print
from tests.support.commands import AT, MODEL, TAIL_AT

CLOSED = "splitonnx: what a command prints cannot be written: standard output is closed"
PRINTING: tuple[tuple[str, ...], ...] = (
    (),
    ("--version",),
    ("train", "--help"),
    ("check", str(MODEL)),
    ("check", str(MODEL), "--json"),
    ("inspect", str(MODEL)),
    ("inspect", str(MODEL), "--json"),
)


def run(words: Sequence[str], redirections: str) -> tuple[int, str, str]:
    """Run a command as a shell does; return its exit code, stdout and stderr."""
    line = f'exec "$@" {redirections}'
    done = subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-m", "splitonnx", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def read_files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("words", PRINTING, ids=" ".join)
def test_a_closed_stdout_is_said_in_one_line(words: tuple[str, ...]) -> None:
    assert run(words, ">&-") == (2, "", CLOSED + "\n")


def test_where_nobody_can_be_told_the_exit_code_is_all() -> None:
    for redirections in (">&- 2>/dev/full", "<&- >&- 2>&-"):
        assert run(("inspect", str(MODEL)), redirections) == (2, "", ""), redirections


def test_an_error_is_not_printed_where_results_belong() -> None:
    for redirections in ("2>&-", "2>/dev/full"):
        assert run(("check", "missing.onnx"), redirections) == (2, "", ""), redirections


def test_results_are_printed_where_stderr_is_closed() -> None:
    expected = run(("inspect", str(MODEL)), "")
    assert expected[0] == 0
    assert run(("inspect", str(MODEL)), "2>&-") == expected


def test_an_error_of_the_model_comes_before_that_of_the_stream() -> None:
    code, _, err = run(("check", "missing.onnx", "--json"), ">&-")
    assert code == 2
    assert "missing.onnx is not a usable ONNX model" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("redirections", "code"), [("2>&-", 0), ("<&- >&- 2>&-", 2)])
def test_a_bundle_is_whole_and_holds_nothing_that_was_printed(
    tmp_path: Path, bundle: Path, redirections: str, code: int
) -> None:
    found = tmp_path / "found"
    words = ("cut", str(MODEL), "--at", AT, "--tail-at", TAIL_AT, "-o", str(found))
    assert run(words, redirections)[0] == code
    assert read_files(found) == read_files(bundle)


def test_a_token_is_kept_though_it_cannot_be_shown(tmp_path: Path) -> None:
    code, _, err = run(("token", "ana", "--token-file", str(tmp_path / "tokens")), ">&-")
    assert code == 2
    assert err.splitlines()[-1] == CLOSED
    assert "ana" in (tmp_path / "tokens").read_text()


def test_a_closed_stdout_stops_nobody_who_prints_nothing(data: Path) -> None:
    words = ("train", str(MODEL), "--local", "--data", str(data), "--quiet")
    assert run(words, ">&-") == (0, "", "")


def test_other_errors_are_not_taken_for_a_closed_stdout() -> None:
    assert explain_failed_print(OSError(errno.ENOENT, "none", "model.onnx")) is None
    assert explain_failed_print(OSError(errno.ENOSPC, "no space", "model.onnx")) is None
    assert explain_failed_print(OSError(errno.ECONNRESET, "reset")) is None
    assert explain_failed_print(OSError(errno.ENOSPC, "no space")) == "no space"
    with open(os.devnull, "w") as writable, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", writable)
        assert explain_failed_print(OSError(errno.EBADF, "a socket's")) is None
