"""Signposts lead somewhere: each file that a page names exists, and holds the name beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES: tuple[str, ...] = (
    "README.md", "CONTRIBUTING.md", "SECURITY.md", "runtime/js/README.md",
)  # fmt: skip
PAGES += tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
GUIDES = ("docs/architecture.md", "CONTRIBUTING.md")
SOURCES = ("splitonnx/", "runtime/", "partitioner/", "tests/", "examples/", "benchmarks/", "docs/")

_PATH = re.compile(r"`([\w./-]+/[\w./-]*)`")
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
_NAME_AND_FILE = re.compile(r"`([A-Za-z_][\w.]*)(?:\(\))?`\s+(?:\(|in\s+)`([\w/]+\.(?:py|ts))`")

NEWCOMERS = {
    "the wait before a reconnect": "runtime/channels/retries.py",
    "the limit on the size of a message, at the server": "runtime/limits.py",
    "the gradient of AveragePool": "partitioner/lowerings/pools.py",
    "what a greeting holds": "splitonnx/messages.py",
    "where and how a checkpoint is written": "runtime/storage/checkpoints.py",
    "which metrics Prometheus sees": "runtime/server/metrics.py",
}
"""What somebody new looks for, and the file to change."""


def read_rows() -> dict[str, tuple[list[str], list[str]]]:
    """Read the first table of docs/architecture.md: what to change, which files, which names."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Where to change what")[1]
    lines = [line for line in text.split("## ")[0].splitlines() if line.startswith("|")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert {len(row) for row in rows} == {3}
    return {
        row[0]: (re.findall("`([^`]+)`", row[1]), re.findall("`([^`]+)`", row[2]))
        for row in rows
        if "`" in row[1]
    }


def read_text(place: Path) -> str:
    """Read a file, or all Python files of a folder."""
    if place.is_file():
        return place.read_text()
    return "\n".join(path.read_text() for path in sorted(place.rglob("*.py")))


def holds(text: str, name: str) -> bool:
    """Return whether a source defines every part of a dotted name."""
    return all(
        re.search(rf"\b(?:def|class|function) {part}\b|^\s*(?:export const )?{part}\b", text, re.M)
        for part in name.split(".")
    )


@pytest.mark.parametrize("page", PAGES)
def test_each_file_of_the_repository_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    named = {path for path in _PATH.findall(text) if path.startswith(SOURCES)}
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]
    links = {link for link in _LINK.findall(text) if "://" not in link}
    assert not [link for link in sorted(links) if not (ROOT / page).parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", GUIDES)
def test_each_name_beside_a_file_is_defined_in_it(page: str) -> None:
    pairs = _NAME_AND_FILE.findall((ROOT / page).read_text())
    assert len(pairs) > 10
    missing = [
        f"{name} in {file}" for name, file in pairs if not holds((ROOT / file).read_text(), name)
    ]
    assert not missing


def test_the_table_of_what_to_change_names_files_that_hold_it() -> None:
    rows = read_rows()
    assert len(rows) > 15
    for what, (files, names) in rows.items():
        others = [name for name in names if "/" in name or name.endswith(".py")]
        near = [name for name in names if name not in others]
        texts = [read_text(ROOT / file) for file in [*files, *others] if (ROOT / file).exists()]
        assert not [name for name in near if not any(holds(text, name) for text in texts)], what


@pytest.mark.parametrize("what", NEWCOMERS)
def test_somebody_new_finds_the_file_within_two_openings(what: str) -> None:
    assert "docs/architecture.md" in (ROOT / "README.md").read_text()
    assert "docs/architecture.md" in (ROOT / "CONTRIBUTING.md").read_text()
    assert NEWCOMERS[what] in read_rows()[what][0]
