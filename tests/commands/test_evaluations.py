"""evaluate, and the metrics of train, run as a user runs them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from splitonnx import PolicyOptions, Server
from tests.support.commands import MODEL, Command


def test_evaluating_prints_the_loss_and_the_metrics(
    command: Command, bundle: Path, url: str, data: Path
) -> None:
    arguments = ("evaluate", bundle / "client", "--server", url, "--data", data)
    lines = command.succeed(*arguments, "--metric", "f1", "--metric", "top-3").splitlines()
    assert [line.split()[0] for line in lines] == ["loss", "accuracy", "f1", "top-3"]
    out = command.succeed(*arguments, "--metric", "perplexity", "--batch-size", 5, "--json")
    found = json.loads(out)
    assert found.keys() == {"loss", "accuracy", "perplexity"}
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]), rel=1e-5)
    assert [float(line.split()[1]) for line in lines[:2]] == pytest.approx(
        [found["loss"], found["accuracy"]], abs=1e-5
    )


def test_evaluating_and_predicting_share_nothing_with_a_server_that_joins_its_clients(
    command: Command, bundle: Path, data: Path, tmp_path: Path
) -> None:
    policy = PolicyOptions(name="splitfed-v1", clients_min=2)
    with Server(bundle / "server", port=0, threads=1, policy=policy) as server:
        arguments = (bundle / "client", "--server", server.url, "--data", data)
        assert "accuracy" in command.succeed("evaluate", *arguments)
        command.succeed("predict", *arguments, "-o", tmp_path / "outputs.npz")
        assert "permit it with --share" in command.fail("train", *arguments)


def test_a_metric_that_does_not_fit_is_one_line(
    command: Command, bundle: Path, url: str, data: Path
) -> None:
    arguments = ("evaluate", bundle / "client", "--server", url, "--data", data)
    assert "mae is for mse or l1" in command.fail(*arguments, "--metric", "mae")
    assert "there is no metric 'f2'" in command.fail(*arguments, "--metric", "f2")


def test_training_logs_its_metrics_and_stops_by_them(
    command: Command, data: Path, tmp_path: Path
) -> None:
    arguments = (
        "train", MODEL, "--local", "--data", data, "--batch-size", 8, "--epochs", 2, "--metric",
        "f1-weighted",
    )  # fmt: skip
    assert "pass eval_data (--eval-data)" in command.fail(*arguments)
    logs = tmp_path / "logs"
    out = command.succeed(
        *arguments, "--eval-data", data, "--keep-best", "f1-weighted", "--json", "--log-dir", logs,
        "--no-tensorboard",
    )  # fmt: skip
    records = [json.loads(line) for line in out.splitlines()]
    evaluations = [one["metrics"] for one in records if "metrics" in one and "step" not in one]
    figures = [metrics["f1-weighted"] for metrics in evaluations]
    assert len(figures) == 2
    assert records[-2]["best"]["value"] == max(figures)
    with (logs / "epochs.csv").open(newline="") as file:
        assert [float(row["f1-weighted"]) for row in csv.DictReader(file)] == figures


def test_a_metric_that_is_not_defined_is_null_in_json(
    command: Command, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with np.load(data) as arrays:
        one = {name: arrays[name] for name in arrays.files}
    one["labels"] = np.zeros_like(one["labels"])
    np.savez(tmp_path / "one.npz", **one)
    out = command.succeed(
        "train", MODEL, "--local", "--data", data, "--eval-data", tmp_path / "one.npz",
        "--batch-size", 8, "--metric", "auc", "--json",
    )  # fmt: skip
    assert json.loads(out.splitlines()[-2])["metrics"]["auc"] is None
    assert "the metric auc is not defined: all labels are of class 0" in caplog.text
