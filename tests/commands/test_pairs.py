"""The table of pairs for a U-shape, and the sentence below it."""

from __future__ import annotations

import pytest

from splitonnx.commands.pairs import choose_pairs, describe_choice, list_pair_cells, print_pairs
from splitonnx.partitioner.reports.u_shapes.pairs import PairCandidate


def make_pair(**changes: object) -> PairCandidate:
    facts = {
        "at": ("h",),
        "tail_at": ("t",),
        "at_shapes": (("N", 8),),
        "tail_shapes": (("N", 4),),
        "bytes_up": 1_500,
        "bytes_down": None,
        "head_parameters": 1_000,
        "tail_parameters": 500,
        "server_parameters": 4_500,
        "client_share": 0.25,
    }
    return PairCandidate(**{**facts, **changes})  # type: ignore[arg-type]


PAIRS = [make_pair(), make_pair(at=("good",), recommended=True), make_pair(bytes_up=0)]


def test_a_pair_is_written_with_bytes_and_shares() -> None:
    assert list_pair_cells(make_pair(at=("h", "mask"))) == (
        "h + mask", "t", "1.5 kB", "?", "1,500 (25%)", "4,500 (75%)",
    )  # fmt: skip


def test_a_pair_that_tells_the_labels_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [make_pair(tells_labels=True), make_pair()]
    assert [list_pair_cells(pair)[1] for pair in pairs] == ["t (tells labels)", "t"]
    print_pairs(pairs, is_end_named=True)
    assert "cut asks for --send-labels" in capsys.readouterr().out
    print_pairs(pairs[1:], is_end_named=True)
    assert "labels" not in capsys.readouterr().out


def test_the_recommended_pairs_are_shown_unless_an_end_is_named() -> None:
    assert choose_pairs(PAIRS, is_end_named=False) == [PAIRS[1]]
    assert choose_pairs(PAIRS, is_end_named=True) == PAIRS
    assert choose_pairs([PAIRS[0]], is_end_named=False) == [PAIRS[0]]


def test_the_sentence_says_which_pairs_are_shown() -> None:
    assert str(describe_choice(PAIRS, is_end_named=False)).startswith("1 of 3 pairs; ")
    assert describe_choice(PAIRS, is_end_named=True) is None


def test_the_sentence_says_why_no_pair_is_recommended() -> None:
    assert "--dim NAME=SIZE" in str(describe_choice([make_pair()], is_end_named=False))
    known = [make_pair(bytes_down=3)]
    assert "trains parameters at both ends" in str(describe_choice(known, is_end_named=False))


def test_the_sentence_says_that_there_is_no_pair(capsys: pytest.CaptureFixture[str]) -> None:
    print_pairs([], is_end_named=False)
    print_pairs([], is_end_named=True)
    assert capsys.readouterr().out.splitlines() == [
        "no pair of tensors divides the model for a U-shape",
        "no pair of tensors with the end that is named divides the model for a U-shape",
    ]


def test_the_table_has_the_shown_pairs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    print_pairs(PAIRS, is_end_named=False)
    out = capsys.readouterr().out
    assert "good" in out
    assert " h " not in out
    assert "up / sample" in out
