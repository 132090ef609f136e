"""What the commands print: results as tables, and JSON for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from splitonnx.commands import printing
from splitonnx.commands.rows import FEW_ROWS
from splitonnx.partitioner.reports.inspections import CutCandidate
from splitonnx.runtime.wire.session_lists import SessionList
from splitonnx.verifications import StepComparison, Verification
from tests.support import tiny
from tests.support.session_lists import make_entry, make_list

Capture = pytest.CaptureFixture[str]


def make_cut(number: int) -> CutCandidate:
    return CutCandidate(
        tensor=f"tensor{number}",
        op="Relu",
        shape=(32, 4),
        bytes_up=512,
        bytes_down=512,
        client_parameters=1,
        server_parameters=2,
        sent=(),
    )


def test_json_lines_are_one_value_each(capsys: Capture) -> None:
    printing.print_json_lines([{"a": 1}, {"b": [2, 3]}])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"a": 1},
        {"b": [2, 3]},
    ]


def test_a_value_is_printed_as_json_over_several_lines(capsys: Capture) -> None:
    printing.print_json({"a": {"b": 1}})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": {"b": 1}}
    assert out.count("\n") > 2


@pytest.mark.parametrize("count", [3, FEW_ROWS + 1])
def test_every_cut_has_a_row_however_many_there_are(count: int, capsys: Capture) -> None:
    printing.print_cuts(map(make_cut, range(count)))
    out = capsys.readouterr().out
    assert all(f"tensor{number} " in out for number in range(count))
    assert "server params" in out


def test_a_bundle_is_summed_up_by_party() -> None:
    summary = printing.summarize_bundle(tiny.split_bundle())
    client, server = summary["parties"]["client"], summary["parties"]["server"]
    assert (client["parameters"], server["parameters"]) == (12, 8)
    assert client["stages"] == ["head.forward", "head.backward", "head.update"]
    assert [wire["tensor"] for wire in client["sends"]] == ["h", "labels"]
    assert [wire["declared"] for wire in server["sends"]] == ["F32[N, 4]", "F32[]"]


def test_outputs_are_told_with_their_shapes(capsys: Capture) -> None:
    printing.print_outputs(Path("out.npz"), {"y": np.zeros((2, 3), np.float32)})
    assert "out.npz: y F32[2, 3]" in capsys.readouterr().out


@pytest.mark.parametrize(("difference", "ok"), [(0.0, True), (0.5, False)])
def test_a_verification_is_told_step_by_step_and_judged(
    difference: float, ok: bool, capsys: Capture
) -> None:
    step = StepComparison(
        step=0, split_loss=1.5, whole_loss=1.25, differences={"loss": 0.0, "W1": difference}
    )
    found = Verification(steps=(step,), rtol=1e-5)
    *steps, verdict = printing.summarize_verification(found)
    assert steps == [{"step": 1, "split_loss": 1.5, "whole_loss": 1.25, "difference": difference}]
    assert (verdict["ok"], verdict["largest_difference"]) == (ok, difference)
    printing.print_verification(found)
    out = capsys.readouterr().out
    assert ("not equal" in out) is not ok
    assert ("W1" in out) is not ok


def test_names_that_look_like_markup_are_printed_as_they_are(capsys: Capture) -> None:
    printing.print_written(Path("[red]model[/].onnx"), 1_000)
    assert "[red]model[/].onnx" in capsys.readouterr().out


def test_of_each_session_is_printed_who_what_and_how_far(capsys: Capture) -> None:
    printing.print_sessions(make_list(make_entry(seconds_since_left=300.0), left_out=3))
    head, _, row, _, last = capsys.readouterr().out.strip().splitlines()
    headings = "session owner doing client last message step version round behind up down saved"
    assert " ".join(head.split()) == headings
    assert [cell.strip() for cell in row.strip().split("   ") if cell.strip()] == [
        "01234567", "ann", "training", "5 min away", "1 s ago", "12", "12", "-", "-", "1.5 kB",
        "2.0 MB", "yes",
    ]  # fmt: skip
    assert last == "4 sessions, 3 of them not listed; policy per-client"


@pytest.mark.parametrize(
    ("steps", "rounds", "text"),
    [(0, None, "-"), (1, None, "1 step"), (2500, None, "2,500 steps"), (9, 0, "-"),
     (9, 1, "1 round"), (9, 2, "2 rounds")],
)  # fmt: skip
def test_a_session_is_behind_by_rounds_where_there_are_some(
    steps: int, rounds: int | None, text: str, capsys: Capture
) -> None:
    printing.print_sessions(make_list(make_entry(steps_behind=steps, rounds_behind=rounds)))
    assert f"  {text} " in capsys.readouterr().out.splitlines()[3]


def test_names_from_a_server_can_neither_move_nor_colour_a_terminal(capsys: Capture) -> None:
    evil = "\x1b[31m\r\x9b2J\u202e[red]x[/]"
    entry = make_entry(owner=evil, session="\x1b\x1b", activity="\x07idle")
    printing.print_sessions(SessionList(policy=evil, rounds=2, sessions=(entry,)))
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert out.count(r"\x1b[31m\r\x9b2J\u202e[red]x[/]") == 2
    assert r"\x07idle" in out
    assert "1 session; policy" in out
    assert "round 2" in out


def test_a_server_without_sessions_says_so(capsys: Capture) -> None:
    printing.print_sessions(make_list())
    assert capsys.readouterr().out == "0 sessions; policy per-client\n"
