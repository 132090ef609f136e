"""--log-dir writes the figures of a training run, and a run that resumes continues them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from splitonnx import extras
from splitonnx.commands.training_logs import TrainingLogOptions, call_both
from splitonnx.errors import MissingExtra, UsageError
from tests.support.commands import MODEL, Command


def test_training_writes_its_figures(command: Command, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    arguments = (
        "train", MODEL, "--local", "--data", data, "--eval-data", data, "--batch-size", 8,
        "--epochs", 2, "--log-dir", folder, "--no-tensorboard",
    )  # fmt: skip
    command.succeed(*arguments)
    with (folder / "steps.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5", "6"]
    with (folder / "epochs.csv").open(newline="") as file:
        assert [(row["step"], row["epoch"]) for row in csv.DictReader(file)] == [
            ("3", "0"),
            ("6", "1"),
        ]
    assert "choose another folder" in command.fail(*arguments)


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: str) -> None:
        raise ModuleNotFoundError(name=module)

    monkeypatch.setattr(extras, "import_module", fail)
    options = TrainingLogOptions(log_dir=tmp_path / "log")
    with pytest.raises(MissingExtra, match=r"--no-tensorboard.*splitonnx\[tensorboard\]"):
        options.open(step=0, resumes=False)
    assert not (tmp_path / "log").exists()


def test_without_a_folder_there_is_no_log() -> None:
    with TrainingLogOptions().open(step=0, resumes=False) as log:
        assert log is None
    with pytest.raises(UsageError, match="--no-tensorboard needs --log-dir"):
        TrainingLogOptions(tensorboard=False).open(step=0, resumes=False)


def test_a_record_goes_to_both() -> None:
    first: list[int] = []
    second: list[int] = []
    call_both(first.append, second.append)(1)
    assert (first, second) == ([1], [1])
