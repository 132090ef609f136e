"""The log of a training run: each step and epoch once, in CSV and for TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from splitonnx.errors import UnwritableFile, UsageError
from splitonnx.runtime.client.histories import Evaluation, StepRecord
from splitonnx.runtime.client.training_logs import TrainingLog
from tests.support.event_files import read_scalars

pytest.importorskip("tensorboardX")


def record(step: int, loss: float | None = None, **metrics: float) -> StepRecord:
    return StepRecord(
        step=step, epoch=(step - 1) // 3, batch=(step - 1) % 3 + 1,
        loss=1 / step if loss is None else loss, metrics=metrics or {"accuracy": 0.25},
        learning_rate=0.1 * step, samples=8, seconds=0.5, bytes_up=100, bytes_down=50,
    )  # fmt: skip


def evaluation(epoch: int, loss: float) -> Evaluation:
    return Evaluation(epoch=epoch, metrics={"loss": loss}, seconds=1.0)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def list_steps(folder: Path, name: str = "steps") -> list[int]:
    return [int(row["step"]) for row in read_rows(folder / f"{name}.csv")]


def test_each_step_and_each_evaluation_is_a_row_and_an_event(tmp_path: Path) -> None:
    with TrainingLog(tmp_path / "new" / "log") as log:
        for step in range(1, 7):
            log.add_step(record(step))
            if step % 3 == 0:
                log.add_evaluation(evaluation(step // 3 - 1, 2 / step))
    folder = tmp_path / "new" / "log"
    rows = read_rows(folder / "steps.csv")
    assert rows[3] == {
        "step": "4", "epoch": "1", "batch": "1", "loss": "0.25", "accuracy": "0.25",
        "learning_rate": "0.4", "samples": "8", "seconds": "0.5", "bytes_up": "100",
        "bytes_down": "50",
    }  # fmt: skip
    assert [float(row["loss"]) for row in rows] == [1 / step for step in range(1, 7)]
    assert read_rows(folder / "epochs.csv") == [
        {"step": "3", "epoch": "0", "loss": str(2 / 3), "seconds": "1.0"},
        {"step": "6", "epoch": "1", "loss": str(2 / 6), "seconds": "1.0"},
    ]
    shown = read_scalars(folder / "train")
    assert shown.keys() == {"loss", "accuracy", "learning_rate"}
    assert shown["loss"] == pytest.approx({step: 1 / step for step in range(1, 7)})
    assert read_scalars(folder / "evaluation")["loss"] == pytest.approx({3: 2 / 3, 6: 2 / 6})


def test_a_run_that_resumes_writes_no_step_twice(tmp_path: Path) -> None:
    with TrainingLog(tmp_path) as log:
        for step in range(1, 6):
            log.add_step(record(step))
            if step == 3:
                log.add_evaluation(evaluation(0, 5.0))
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("6,1,3,0.1")  # a row that a killed process did not finish
    with TrainingLog(tmp_path, step=3, resumes=True) as log:
        log.add_evaluation(evaluation(0, 4.0))  # it was not part of the checkpoint
        log.add_step(record(4, loss=7.0))
    assert list_steps(tmp_path) == [1, 2, 3, 4]
    assert read_rows(tmp_path / "steps.csv")[-1]["loss"] == "7.0"
    assert [row["loss"] for row in read_rows(tmp_path / "epochs.csv")] == ["4.0"]
    assert read_scalars(tmp_path / "train")["loss"] == pytest.approx(
        {1: 1, 2: 1 / 2, 3: 1 / 3, 4: 7}
    )
    assert read_scalars(tmp_path / "evaluation")["loss"] == {3: 4.0}


def test_steps_that_were_lost_and_are_repeated_replace_what_was_written(tmp_path: Path) -> None:
    with TrainingLog(tmp_path) as log:
        for step in (1, 2, 3, 4, 2, 3):
            log.add_step(record(step))
    assert list_steps(tmp_path) == [1, 2, 3]
    assert list(read_scalars(tmp_path / "train")["loss"]) == [1, 2, 3]


def test_training_that_continues_after_a_save_continues_the_log(tmp_path: Path) -> None:
    for first in (1, 3):
        with TrainingLog(tmp_path, step=first - 1) as log:
            log.add_step(record(first))
            log.add_step(record(first + 1))
    assert list_steps(tmp_path) == [1, 2, 3, 4]
    assert list(read_scalars(tmp_path / "train")["loss"]) == [1, 2, 3, 4]


def test_the_log_of_another_run_is_left_as_it_is(tmp_path: Path) -> None:
    with TrainingLog(tmp_path) as log:
        log.add_step(record(1))
    before = (tmp_path / "steps.csv").read_bytes()
    with pytest.raises(UsageError, match="goes on to step 1, and this training begins at step 0"):
        TrainingLog(tmp_path)
    with TrainingLog(tmp_path, step=1) as log, pytest.raises(UsageError, match="has the columns"):
        log.add_step(record(2, f1=0.5))
    assert (tmp_path / "steps.csv").read_bytes() == before
    (tmp_path / "steps.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="it has no column 'step'"):
        TrainingLog(tmp_path)


def test_tables_alone_need_no_library(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, tensorboard=False) as log:
        log.add_step(record(1))
        log.add_evaluation(evaluation(0, 1.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs.csv", "steps.csv"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableFile, match="file"):
        TrainingLog(tmp_path / "file" / "log", tensorboard=False)
