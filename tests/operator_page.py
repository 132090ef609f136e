"""docs/operators.md: the state of every ONNX operator, as the node cases find it.

    python -m tests.operator_page

writes the page anew; a test holds the page that is there against what the cases say now.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import onnx

from tests.conftest import ROOT
from tests.node_cases import TARGETS, Outcome, is_tensors_only, list_node_cases, try_case

PAGE = ROOT / "docs" / "operators.md"

LEAST = 120
"""Operators that must be differentiable."""

ELSEWHERE: Mapping[str, str] = {}
"""Operators that the onnx package has no case of tensors for -> the test that holds them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operator: its status on each target, and over how many cases that was found."""

    operator: str
    statuses: Mapping[str, str]
    cases: int
    remark: str = ""


@cache
def try_operator(operator: str) -> tuple[Outcome, ...]:
    """Try every case of an operator on both targets, once a process."""
    cases = [case for case in list_node_cases(operator) if is_tensors_only(case)]
    return tuple(try_case(case, target) for case in cases for target in TARGETS)


def list_operators() -> list[str]:
    """List every operator of ONNX's own domain, deprecated ones that old models hold included."""
    schemas = onnx.defs.get_all_schemas_with_history()
    return sorted({schema.name for schema in schemas if schema.domain == ""})


def describe_operator(operator: str) -> Row:
    """Sum up what the cases of an operator came to."""
    ...


def write_page(rows: Sequence[Row]) -> str:
    """Write the page's text."""
    ...
