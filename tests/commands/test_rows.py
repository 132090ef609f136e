"""The table of cuts as plain lines."""

from __future__ import annotations

import pytest

from splitonnx.commands.rows import (
    describe_no_cuts,
    format_age,
    format_bytes,
    format_rows,
    list_cells,
)
from splitonnx.partitioner.reports.inspections import CutCandidate


def make_cut(**changes: object) -> CutCandidate:
    facts = {
        "tensor": "h",
        "op": "Relu",
        "shape": (None, 24, 8),
        "bytes_up": 1_500,
        "bytes_down": None,
        "client_parameters": 264,
        "server_parameters": 22_858,
        "sent": (),
    }
    return CutCandidate(**{**facts, **changes})  # type: ignore[arg-type]


def test_text_begins_at_the_left_and_numbers_end_at_the_right() -> None:
    rows = [("long name", "1"), ("a", "1,000")]
    assert list(format_rows(("tensor", "size"), rows, left=1)) == [
        " tensor       size",
        " -----------------",
        " long name       1",
        " a           1,000",
    ]


def test_a_column_is_as_wide_as_its_heading_at_least() -> None:
    _, line, row = format_rows(("heading",), [("x",)], left=1)
    assert line == " " + "-" * 7
    assert row == " x"


def test_without_rows_there_are_the_headings() -> None:
    assert len(list(format_rows(("a", "b"), [], left=2))) == 2


def test_a_row_of_another_length_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        list(format_rows(("a", "b"), [("only one",)], left=1))


def test_a_cut_is_written_with_a_question_mark_for_what_is_not_known() -> None:
    assert list_cells(make_cut()) == ("h", "Relu", "? x 24 x 8", "1.5 kB", "?", "264", "22,858")


def test_the_batch_is_written_without_the_sum_that_refuses_one_sample() -> None:
    assert list_cells(make_cut(shape=("N_less_1 + 1", 8)))[2] == "N x 8"


def test_what_crosses_beside_a_tensor_stands_beside_it() -> None:
    assert list_cells(make_cut(sent=("mask", "labels")))[0] == "h + mask + labels"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1, "1 byte"), (1_500_000, "1.5 MB"), (None, "?")]
)
def test_bytes_are_written_as_people_read_them(size: int | None, text: str) -> None:
    assert format_bytes(size) == text


def test_a_cut_that_sends_raw_inputs_is_marked_with_the_options_it_needs() -> None:
    cell = list_cells(make_cut(sent=("mask",), raw=("mask", "x y")))[0]
    assert cell == "h + mask (--send-input mask --send-input 'x y')"


def test_where_nothing_divides_a_model_the_inputs_that_help_are_named() -> None:
    assert "--with" not in describe_no_cuts([])
    assert "; --with x or --with 'y z' lists cuts" in describe_no_cuts([("x",), ("y z",)])
    assert "; --with x --with y lists cuts" in describe_no_cuts([("x", "y")])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "never"),
        (0.0, "0 s ago"),
        (119.4, "119 s ago"),
        (120.0, "2 min ago"),
        (7199.0, "120 min ago"),
        (7200.0, "2 h ago"),
        (1e6, "278 h ago"),
    ],
)
def test_ages_are_written_as_people_read_them(seconds: float | None, text: str) -> None:
    assert format_age(seconds, "never") == text
