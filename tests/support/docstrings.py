"""A sample of the public docstrings, for somebody to judge their prose.

    python -m tests.support.docstrings SEED

prints 100 of them, drawn from modules, classes, functions and methods whose names are public; the
same seed draws the same sample of the same source.  CONTRIBUTING.md describes what to look for.
"""

from __future__ import annotations

import ast
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.conftest import ROOT

SIZE = 100
FOLDERS = ("splitonnx", "runtime", "partitioner")

_Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Docstring:
    """A docstring, and where it is: the file, the line and the dotted name of its owner."""

    path: str
    line: int
    name: str
    text: str
    is_function: bool = False


@cache
def list_docstrings(root: Path = ROOT) -> tuple[Docstring, ...]:
    """List the public docstrings of the three folders, ordered by file and line."""
    return tuple(
        found
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*.py"))
        if not _is_left_out(path.relative_to(root))
        for found in _walk(path.relative_to(root).as_posix(), "", ast.parse(path.read_text()))
    )


def draw_sample(seed: int, size: int = SIZE, root: Path = ROOT) -> list[Docstring]:
    """Draw docstrings at random, without repetition."""
    return random.Random(seed).sample(list_docstrings(root), size)


def _is_left_out(path: Path) -> bool:
    """Return whether a file was installed there, or is seen by another way through a link."""
    return "node_modules" in path.parts or path.parts[:2] in {
        ("splitonnx", "runtime"),
        ("splitonnx", "partitioner"),
    }


def _walk(path: str, prefix: str, owner: _Owner) -> Iterator[Docstring]:
    is_function = isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef)
    text = ast.get_docstring(owner)
    if text:
        line = 1 if isinstance(owner, ast.Module) else owner.lineno
        name = prefix or "(module)"
        yield Docstring(path=path, line=line, name=name, text=text, is_function=is_function)
    if not is_function:
        for inner in owner.body:
            if isinstance(inner, _Owner) and not inner.name.startswith("_"):
                dot = "." if prefix else ""
                yield from _walk(path, f"{prefix}{dot}{inner.name}", inner)


if __name__ == "__main__":
    for number, one in enumerate(draw_sample(int(sys.argv[1])), 1):
        print(f"{number}. {one.path}:{one.line} {one.name}\n{one.text}\n")
