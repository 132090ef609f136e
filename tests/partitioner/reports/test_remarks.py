"""Remarks: how options and names are written in them."""

from __future__ import annotations

import shlex

from splitonnx.partitioner.reports.remarks import list_names, make_option


def test_an_option_is_one_word_more_for_a_shell_whatever_its_value() -> None:
    for value in ("plain", "a b", "^(a|b)$", "it's"):
        assert shlex.split(make_option("--freeze", value)) == ["--freeze", value]


def test_few_names_are_listed_and_many_are_counted() -> None:
    assert list_names(["a", "b", "c", "d"]) == "'a', 'b', 'c', 'd'"
    assert list_names(["a", "b", "c", "d", "e"]) == "'a', 'b', 'c' and 2 more"
