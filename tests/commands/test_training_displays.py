"""Training is shown on stderr, or as JSON on stdout, or not at all."""

from __future__ import annotations

import json

import pytest

from splitonnx.commands.training_displays import Bar, Lines, PlacementNote, Silence, choose_display
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import Evaluation, History, StepRecord
from splitonnx.runtime.engine.placements import Placement, StagePlacement

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


PLACEMENT = Placement(provider="cuda", stages=[StagePlacement(stage="a", left={"Size": 1})])
REMARK = "the provider cuda leaves to the CPU: 1 node of 'a' (1 Size)"


class Accelerated(Client):
    """A client whose provider left one node."""

    def __init__(self, placement: Placement | None) -> None:
        self._found = placement

    @property
    def placement(self) -> Placement | None:
        return self._found


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


def test_the_peak_of_memory_is_shown_where_it_is_known(capsys: Capture) -> None:
    Lines().summarize(HISTORY, "saved", 123_000_000)
    assert json.loads(capsys.readouterr().out) == {"memory": {"peak_bytes": 123_000_000}}
    Bar(epochs=1).summarize(HISTORY, "saved", 123_000_000)
    out = capsys.readouterr().out
    assert "peak memory" in out
    assert "123.0 MB" in out
    Silence().summarize(HISTORY, "saved", 123_000_000)
    assert capsys.readouterr().out == ""


def test_a_run_that_resumes_does_not_begin_at_0(capsys: Capture) -> None:
    bar = Bar(epochs=2)
    resumed = StepRecord(
        step=9, epoch=1, batch=1, loss=1, metrics={}, learning_rate=0.1, samples=1, seconds=1,
        bytes_up=0, bytes_down=0,
    )  # fmt: skip
    with bar.showing(8):
        bar.show_step(resumed)
    assert "5/8" in capsys.readouterr().err


def test_what_a_provider_leaves_is_a_json_line_or_a_remark_or_not_shown(capsys: Capture) -> None:
    Lines().show_placement(PLACEMENT)
    out, err = capsys.readouterr()
    assert (json.loads(out)["placement"]["sentence"], err) == (REMARK, "")
    Bar(1).show_placement(PLACEMENT)
    assert capsys.readouterr() == ("", f"remark: {REMARK}\n")
    Silence().show_placement(PLACEMENT)
    assert capsys.readouterr() == ("", "")


def test_it_is_shown_once_after_the_second_step(capsys: Capture) -> None:
    note = PlacementNote(Accelerated(PLACEMENT), Bar(1))
    note.add_step(record(1))
    assert capsys.readouterr().err == ""
    for step in (2, 3):
        note.add_step(record(step))
    note.finish()
    assert capsys.readouterr().err == f"remark: {REMARK}\n"


def test_after_a_single_step_it_is_shown_at_the_end(capsys: Capture) -> None:
    note = PlacementNote(Accelerated(PLACEMENT), Bar(1))
    note.add_step(record(1))
    note.finish()
    assert capsys.readouterr().err == f"remark: {REMARK}\n"


def test_nothing_is_shown_of_the_cpu(capsys: Capture) -> None:
    note = PlacementNote(Accelerated(None), Bar(1))
    note.add_step(record(1))
    note.add_step(record(2))
    note.finish()
    assert capsys.readouterr() == ("", "")
