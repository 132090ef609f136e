"""The documentation, held against the code: its quickstart runs, its commands and links exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import typer

from splitonnx.commands import app
from tests.conftest import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def list_blocks(page: Path, language: str) -> list[str]:
    """List the fenced blocks of one language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def list_commands(program: str) -> list[str]:
    """List every command line that some page shows after a prompt, without its comment."""
    return [
        line.removeprefix("$ ")
        for page in PAGES
        for block in list_blocks(page, "console")
        for line in block.splitlines()
        if line.startswith(f"$ {program} ")
    ]


def make_quickstart_folder(clone: Path) -> Path:
    """Make the folder of the quickstart by the command of the README, but for the installation."""
    (clone / "examples").symlink_to(ROOT / "examples")
    (line,) = [line for line in list_commands("mkdir") if "quickstart" in line]
    subprocess.run(["sh", "-c", line], cwd=clone, check=True)
    return clone / "quickstart"


def test_the_quickstart_trains_a_model_twice_in_a_row_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_quickstart_folder(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["digits.onnx"]
    monkeypatch.chdir(folder)
    (block,) = list_blocks(ROOT / "README.md", "python")
    first: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), first)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)

    assert first["history"].steps[0].loss > 2
    assert names["history"].steps[0].loss > 2
    session = onnxruntime.InferenceSession("trained.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": names["data"]["image"]})
    assert (logits.argmax(axis=1) == names["data"]["labels"]).mean() > 0.9


def test_the_readme_shows_every_command() -> None:
    shown = {shlex.split(line, comments=True)[1] for line in list_commands("splitonnx")}
    training = {"check", "inspect", "cut", "serve", "train", "predict", "merge", "verify"}
    assert shown == {*training, "adapt", "evaluate", "explain", "token", "export", "sessions"}


@cache
def find_commands() -> dict[str, Any]:
    """Find the commands of the command line by their names."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


@pytest.mark.parametrize("line", list_commands("splitonnx"))
def test_the_command_line_takes_what_the_pages_show(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    find_commands()[name].make_context(name, arguments)  # raises where an option is unknown


@pytest.mark.parametrize("line", list_commands("make"))
def test_the_makefile_has_the_targets_that_the_pages_show(line: str) -> None:
    _, target, *_ = line.split()
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.is_file(), target
        assert not heading or heading in list_anchors(linked), target


def list_anchors(page: Path) -> set[str]:
    """List a page's headings as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(
        r"\b(?:splitonnx|partitioner|runtime|tests)/[\w/]+\.py", page.read_text()
    ):
        assert (ROOT / name).is_file(), name
