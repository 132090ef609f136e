"""What the commands print: results on stdout, progress on stderr, and JSON for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from splitonnx.commands import printing
from splitonnx.commands.printing import Bar, Lines, Silence, choose_display
from splitonnx.commands.rows import FEW_ROWS
from splitonnx.partitioner.reports.inspections import CutCandidate
from splitonnx.runtime.client.histories import Evaluation, History, StepRecord
from splitonnx.verifications import StepComparison, Verification
from tests.support import tiny

Capture = pytest.CaptureFixture[str]


def record(step: int, *, traffic: int = 2_000) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=0,
        batch=step,
        loss=1 / step,
        metrics={"accuracy": 0.25},
        learning_rate=0.1,
        samples=8,
        seconds=0.5,
        bytes_up=traffic,
        bytes_down=traffic // 2,
    )


EVALUATION = Evaluation(epoch=0, metrics={"accuracy": 0.75}, seconds=1.0)
HISTORY = History(steps=[record(1), record(2)], evaluations=[EVALUATION])


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


def test_training_is_shown_as_was_asked_for() -> None:
    assert isinstance(choose_display(as_json=False, quiet=True, epochs=1), Silence)
    assert isinstance(choose_display(as_json=True, quiet=False, epochs=1), Lines)
    assert isinstance(choose_display(as_json=False, quiet=False, epochs=1), Bar)


def test_silence_is_silent(capsys: Capture) -> None:
    silence = Silence()
    with silence.showing(3):
        silence.show_step(record(1))
        silence.show_evaluation(EVALUATION)
    silence.summarize(HISTORY, "saved")
    assert capsys.readouterr() == ("", "")


def test_lines_are_the_records_and_nothing_else(capsys: Capture) -> None:
    lines = Lines()
    with lines.showing(3):
        lines.show_step(record(1))
        lines.show_evaluation(EVALUATION)
    lines.summarize(HISTORY, "saved")
    out, err = capsys.readouterr()
    step, evaluation = map(json.loads, out.splitlines())
    assert (step["step"], evaluation["metrics"], err) == (1, {"accuracy": 0.75}, "")


def test_a_bar_moves_on_stderr_and_sums_up_on_stdout(capsys: Capture) -> None:
    bar = Bar(epochs=1)
    with bar.showing(2):
        bar.show_step(record(1))
        bar.show_step(record(2))
        bar.show_evaluation(EVALUATION)
    progress = capsys.readouterr()
    assert progress.out == ""
    for word in ("2/2", "epoch 1/1", "loss 0.5000", "accuracy 0.2500", "accuracy 0.7500"):
        assert word in progress.err
    bar.summarize(HISTORY, "saved in bundle")
    out = capsys.readouterr().out
    for word in ("saved in bundle", "16", "2.0 kB", "1.0 kB", "0.7500"):
        assert word in out


def test_a_run_that_resumes_does_not_begin_at_0(capsys: Capture) -> None:
    bar = Bar(epochs=2)
    resumed = StepRecord(
        step=9, epoch=1, batch=1, loss=1, metrics={}, learning_rate=0.1, samples=1, seconds=1,
        bytes_up=0, bytes_down=0,
    )  # fmt: skip
    with bar.showing(8):
        bar.show_step(resumed)
    assert "5/8" in capsys.readouterr().err


def test_names_that_look_like_markup_are_printed_as_they_are(capsys: Capture) -> None:
    printing.print_written(Path("[red]model[/].onnx"), 1_000)
    assert "[red]model[/].onnx" in capsys.readouterr().out
