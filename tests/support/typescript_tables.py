"""The tables of the JavaScript client that are written from Python's: what a graph may hold.

    python -m tests.support.typescript_tables

writes ``runtime/js/src/operators.ts`` and ``runtime/js/src/graph_limits.ts`` again; a test compares
the files with what is written now.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from splitonnx import operators
from splitonnx.graph_limits import STAGE, GraphLimits, StageLimits
from tests.conftest import ROOT

SOURCES = ROOT / "runtime" / "js" / "src"
ELSEWHERE = frozenset({"total_bytes"})
"""A phone holds less: ``bundles.ts`` has the limit there."""

_NOTICE = "Written by `python -m tests.support.typescript_tables`; a test checks that it is fresh."


def write_tables() -> Mapping[Path, str]:
    """Return the content of each file in TypeScript."""
    return {
        SOURCES / "operators.ts": _write_operators(),
        SOURCES / "graph_limits.ts": _write_limits(),
    }


def read_comments(owner: type) -> Mapping[str, str]:
    """Return the string below each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _write_limits() -> str:
    comments = {**read_comments(GraphLimits), **read_comments(StageLimits)}
    lines = [
        *_comment("What a stage's graph may hold at most.", _NOTICE),
        "",
    ]
    for name, number in asdict(STAGE).items():
        if name not in ELSEWHERE:
            lines += [*_comment(comments[name]), _declare(f"MAX_{name.upper()}", number)]
    return "\n".join(lines) + "\n"


def _write_operators() -> str:
    domains = sorted(operators.STANDARD_DOMAINS)
    lines = [
        *_comment("The operators of a bundle's graphs; the gate refuses every other.", _NOTICE),
        "",
        f"export const STANDARD_DOMAINS: readonly string[] = {_list(domains)};",
        _declare("TRAINING_DOMAIN", operators.TRAINING_DOMAIN),
        "",
        *_comment("Of the standard operators."),
        _declare("HIGHEST_OPSET", operators.HIGHEST_OPSET),
        _declare("HIGHEST_TRAINING_OPSET", operators.HIGHEST_TRAINING_OPSET),
        _declare("HIGHEST_IR_VERSION", operators.HIGHEST_IR_VERSION),
        "",
        *_comment("All that ONNX ever had in its own domain, up to the highest opset."),
        *_declare_set("STANDARD_OPERATORS", operators.STANDARD_OPERATORS),
        "",
        *_comment(
            "What the gradient builder of onnxruntime-training makes; some of it is in ONNX's "
            "domain."
        ),
        *_declare_set("TRAINING_OPERATORS", operators.TRAINING_OPERATORS),
        "",
        *_comment("Attributes whose numbers below 1 ONNX Runtime divides by."),
        f"export const WINDOWS: readonly string[] = {_list(operators.WINDOWS)};",
        *_comment("Attributes whose numbers may lead it beyond its shapes."),
        f"export const AXES: readonly string[] = {_list(operators.AXES)};",
        *_comment("Attributes that name an element type."),
        f"export const KINDS: readonly string[] = {_list(operators.KINDS)};",
        *_comment("Of an Einsum; with another one, onnx's inference may search without end."),
        f"export const EQUATION = /^{operators.EQUATION.pattern.decode()}$/;",
    ]
    return "\n".join(lines) + "\n"


def _comment(*paragraphs: str) -> list[str]:
    """Write a comment, in one line where it fits."""
    if len(paragraphs) == 1 and len(paragraphs[0]) <= 93:
        return [f"/** {paragraphs[0]} */"]
    lines = [line for text in paragraphs for line in ("", *textwrap.wrap(text, 97))][1:]
    return ["/**", *(f" * {line}".rstrip() for line in lines), " */"]


def _declare(name: str, value: float | str) -> str:
    return f"export const {name} = {_list([value])[1:-1] if isinstance(value, str) else value};"


def _declare_set(name: str, names: Iterable[str]) -> list[str]:
    listed = textwrap.wrap(" ".join(sorted(names)), 95)
    return [
        f"export const {name}: ReadonlySet<string> = new Set(",
        "  `",
        *(f"    {line}" for line in listed),
        "  `",
        "    .trim()",
        r"    .split(/\s+/),",
        ");",
    ]


def _list(texts: Iterable[str]) -> str:
    return "[" + ", ".join(f'"{text}"' for text in sorted(texts)) + "]"


if __name__ == "__main__":
    for path, content in write_tables().items():
        path.write_text(content)
