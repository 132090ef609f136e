"""Every ONNX operator's gradient, in every node case of the onnx package, on both targets."""

from __future__ import annotations

import pytest

from tests.operator_page import (
    NATIVE,
    PAGE,
    REWRITTEN,
    describe_operator,
    list_operators,
    try_operator,
    write_page,
)

LEAST = 120
"""Operators that must be differentiable on both targets."""


@pytest.mark.filterwarnings("ignore")  # numpy warns of what the reference evaluator overflows
@pytest.mark.parametrize("operator", list_operators())
def test_gradients_and_values_are_right_or_refused_in_a_sentence(operator: str) -> None:
    for outcome in try_operator(operator):
        assert outcome.ok or outcome.refusal, outcome
        assert "\n" not in outcome.refusal
        assert not outcome.refusal.startswith("FAILED"), outcome


@pytest.mark.filterwarnings("ignore")
def test_the_page_of_operators_is_fresh_and_long_enough() -> None:
    rows = [describe_operator(name) for name in list_operators()]
    differentiable = [
        row
        for row in rows
        if all(status in (NATIVE, REWRITTEN) for status in row.statuses.values())
    ]
    assert len(differentiable) >= LEAST
    assert PAGE.read_text() == write_page(rows), "write it anew: python -m tests.operator_page"
