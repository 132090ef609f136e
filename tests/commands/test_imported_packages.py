"""Which packages each command imports: what trains and serves needs nothing of the partitioner."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import splitonnx
from splitonnx.commands.helping import EXAMPLES
from tests.support.commands import AT, MODEL, TAIL_AT

TELLING = """
import atexit, json
import sys
from splitonnx import commands, imports

def tell():
    names = [n for n, m in sys.modules.items() if type(m) is not imports._Postponed]
    with open("told.json", "w") as file:
        json.dump(names, file)

atexit.register(tell)
commands.main()
"""
"""A program that writes down which modules were imported, but not those that would be if used."""

COMMAND_LINE = {
    "annotated_doc", "annotated_types", "msgspec", "pydantic", "pydantic_core", "shellingham",
    "typer", "typing_extensions", "typing_inspection",
}  # fmt: skip
"""What every command may import: typer, what it needs itself, and msgspec."""
PRINTING = {"markdown_it", "mdurl", "pygments", "rich"}
VALUES = {"cython_runtime", "numpy"}
CLIENT = {*VALUES, "onnxruntime", "websockets"}
SERVER = {*CLIENT, "prometheus_client"}
PARTITIONER = {
    *VALUES, "google", "ml_dtypes", "onnx", "onnx_ir", "packaging",
    "splitonnx.partitioner",
}  # fmt: skip

ALLOWED: dict[str, set[str]] = {
    "adapt": PRINTING | PARTITIONER,
    "check": PRINTING | PARTITIONER,
    "cut": PRINTING | PARTITIONER,
    "evaluate": PRINTING | CLIENT,
    "explain": PRINTING | VALUES,
    "export": PRINTING | VALUES | {"flatbuffers", "onnxruntime", "ort_flatbuffers_py"},
    "inspect": PRINTING | PARTITIONER,
    "merge": PRINTING | PARTITIONER,
    "predict": PRINTING | CLIENT,
    "serve": SERVER | {"uvloop"},
    "sessions": PRINTING | VALUES | {"websockets"},
    "token": set(),
    "train": PRINTING | CLIENT,
    "verify": PRINTING | PARTITIONER | CLIENT,
}
"""What each command may import beside ``COMMAND_LINE`` and Python's own modules."""


def list_imported(folder: Path, *words: object) -> set[str]:
    """Run a command, and list the packages that it imported, and ``splitonnx.partitioner``."""
    process = subprocess.Popen(
        [sys.executable, "-c", TELLING, *map(str, words)],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    if words[0] == "serve" and len(words) > 2:
        assert "serving on" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 0, err
    names = json.loads((folder / "told.json").read_text())
    own = {name for name in names if name == "splitonnx.partitioner"}
    others = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    return own | {name for name in others if not name.startswith(("_", "splitonnx"))}


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mobile") / "bundle"
    splitonnx.cut(MODEL, at=AT, tail_at=TAIL_AT, client_target="portable").save(folder)
    return folder


@pytest.fixture
def arguments(
    bundle: Path, mobile: Path, data: Path, tmp_path: Path
) -> Iterator[dict[str, list[object]]]:
    """Map each command to arguments with which it succeeds."""
    shutil.copytree(bundle / "server", tmp_path / "served")
    with splitonnx.Server(bundle / "server", port=0, threads=1) as server:
        client, asking = bundle / "client", ["--server", server.url, "--data", data]
        yield {
            "adapt": [MODEL, "--lora", ".", "-o", "adapted.onnx"],
            "check": [MODEL],
            "cut": [MODEL, "--at", AT, "--send-labels", "-o", "cut"],
            "evaluate": [client, *asking],
            "explain": [client],
            "export": [mobile / "client", "--for", "mobile", "-o", tmp_path / "exported"],
            "inspect": [MODEL],
            "merge": [mobile, "-o", "merged.onnx"],
            "predict": [client, *asking, "-o", "predicted.npz"],
            "serve": [tmp_path / "served", "--port", "0"],
            "sessions": [server.url],
            "token": ["ana", "--token-file", "tokens"],
            "train": [client, *asking, "--epochs", "1"],
            "verify": [mobile, "--data", data, "--steps", "1"],
        }


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_each_command_imports_only_what_it_may(
    name: str, arguments: dict[str, list[object]], tmp_path: Path
) -> None:
    assert list_imported(tmp_path, name, *arguments[name]) <= COMMAND_LINE | ALLOWED[name]


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["--help"], PRINTING),
        (["--version"], set()),
        (["serve", "--help"], PRINTING),
        (["train", "--help"], PRINTING),
        (["cut", "--help"], PRINTING),
    ],
)
def test_help_and_version_import_no_package_that_computes(
    words: list[str], allowed: set[str], tmp_path: Path
) -> None:
    assert list_imported(tmp_path, *words) <= COMMAND_LINE | allowed


def test_the_list_of_what_was_imported_is_one(tmp_path: Path) -> None:
    """What a command needs is on it, so that a command that imports more would be found."""
    found = list_imported(tmp_path, "inspect", MODEL)
    assert {"numpy", "onnx", "onnx_ir", "splitonnx.partitioner", "typer"} <= found
    assert "sympy" not in found
