"""--early-stop, --patience and --keep-best as the command line spells them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitonnx.bundles import Bundle
from splitonnx.commands.stopping import StoppingOptions
from splitonnx.errors import UsageError
from splitonnx.stopping import EarlyStopping
from tests.support.commands import MODEL, Command


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (StoppingOptions(), None),
        (StoppingOptions(early_stop="loss"), EarlyStopping(metric="loss", patience=5)),
        (
            StoppingOptions(early_stop="f1=min", patience=2),
            EarlyStopping(metric="f1", mode="min", patience=2),
        ),
        (StoppingOptions(keep_best="f1"), EarlyStopping(metric="f1", patience=None)),
    ],
)
def test_options_become_settings(given: StoppingOptions, expected: EarlyStopping | None) -> None:
    assert given.read() == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (StoppingOptions(early_stop="loss", keep_best="loss"), "exclude each other"),
        (StoppingOptions(patience=3), "--patience needs --early-stop"),
        (StoppingOptions(keep_best="loss", patience=3), "--patience needs --early-stop"),
        (StoppingOptions(early_stop="loss=down"), "--early-stop loss=down: write it as METRIC"),
        (StoppingOptions(keep_best="=min"), "--keep-best =min: write it as METRIC"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: StoppingOptions, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        given.read()


def test_training_stops_early_and_says_which_weights_it_kept(
    command: Command, bundle: Path, url: str, data: Path
) -> None:
    arguments = (
        "train", bundle / "client", "--server", url, "--data", data, "--batch-size", 8,
        "--epochs", 4, "--early-stop", "loss=max", "--patience", 1,
    )  # fmt: skip
    assert "--eval-data" in command.fail(*arguments)
    assert "no metric 'f2' to stop by; an evaluation has loss, accuracy" in command.fail(
        "train", MODEL, "--local", "--data", data, "--eval-data", data, "--keep-best", "f2"
    )
    out = command.succeed(*arguments, "--eval-data", data)
    assert "the weights are those after epoch 1, step 3, the best ones" in " ".join(out.split())
    assert Bundle.load(bundle).client.step == 3


def test_a_best_epoch_is_a_line_of_json(command: Command, data: Path) -> None:
    out = command.succeed(
        "train", MODEL, "--local", "--data", data, "--eval-data", data, "--batch-size", 8,
        "--epochs", 3, "--keep-best", "loss", "--json",
    )  # fmt: skip
    lines = [json.loads(line) for line in out.splitlines()]
    losses = [one["metrics"]["loss"] for one in lines if "step" not in one and "metrics" in one]
    epoch = losses.index(min(losses))
    best = lines[-2]["best"]
    assert (best["epoch"], best["step"], best["value"]) == (epoch, 3 * epoch + 3, losses[epoch])
