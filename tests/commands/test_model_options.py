"""Options that say what a model's file does not say are read, and those of another form refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from splitonnx.bundles import Bundle
from splitonnx.commands.model_options import ModelOptions, read_bindings, read_dims, read_states
from splitonnx.errors import UsageError
from splitonnx.names import BatchNormModes
from tests.support.carried import BATCH, build_recurrent, draw_data
from tests.support.commands import AT, MODEL, Command
from tests.support.small_models import MODELS, load_data


@pytest.mark.parametrize(
    ("given", "modes"),
    [
        (None, None),
        (["train"], "train"),
        (["train", "frozen"], "frozen"),
        (["frozen", "^head=train"], {"": "frozen", "^head": "train"}),
        (["a=b=train"], {"a=b": "train"}),
        (["^a=train", "^b=train", "^a=frozen"], {"^b": "train", "^a": "frozen"}),
    ],
)
def test_modes_are_read_in_order(given: list[str] | None, modes: BatchNormModes) -> None:
    read = ModelOptions(batchnorm=given).read_batchnorm()
    assert read == modes
    if isinstance(read, dict) and isinstance(modes, dict):
        assert list(read) == list(modes)


@pytest.mark.parametrize("text", ["off", "^head=off", "=train", "^head"])
def test_a_mode_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="say train or frozen"):
        ModelOptions(batchnorm=[text]).read_batchnorm()


def test_sizes_are_numbers_or_symbols() -> None:
    assert read_dims(["T=128", "x:0=N"]) == {"T": 128, "x:0": "N"}
    assert read_dims(None) == {}


def test_values_are_numbers_or_booleans() -> None:
    assert read_bindings(["rate=16000", "mean=0.1,-2e-3", "on=true"]) == {
        "rate": [16000],
        "mean": [0.1, -2e-3],
        "on": [True],
    }
    with pytest.raises(UsageError, match="'fast' is not a number"):
        read_bindings(["rate=fast"])


def test_ties_are_pairs() -> None:
    assert ModelOptions(tie=["a=b"]).read_ties() == [("a", "b")]


@pytest.mark.parametrize("text", ["T", "=3", "T="])
def test_an_option_without_a_name_or_a_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write it as NAME=SIZE"):
        read_dims([text])
    with pytest.raises(UsageError, match="write it as INPUT=VALUE"):
        read_bindings([text])
    with pytest.raises(UsageError, match="write it as A=B"):
        ModelOptions(tie=[text]).read_ties()
    with pytest.raises(UsageError, match="write it as OUT=IN"):
        read_states([text])


def test_cut_follows_every_option_and_keeps_it_in_the_recipe(
    command: Command, tmp_path: Path
) -> None:
    tied, detached = MODELS / "30_lost_tie.onnx", MODELS / "41_lost_detach.onnx"
    command.succeed(
        "cut", tied, "--at", "e", "--tail-at", "m", "--dim", "ids:1=5",
        "--tie", "shared.weight=onnx::MatMul_1430", "--labels", "next", "-o", tmp_path / "tied",
    )  # fmt: skip
    recipe = Bundle.load(tmp_path / "tied").manifest.recipe
    assert recipe.ties == (("shared.weight", "onnx::MatMul_1430"),)
    assert (recipe.dims, recipe.labels) == ({"ids:1": 5}, "next")
    command.succeed(
        "cut", detached, "--at", "s", "--send-labels", "--stop-gradient", "e",
        "--class-axis", "-1",
        "-o", tmp_path / "detached",
    )  # fmt: skip
    recipe = Bundle.load(tmp_path / "detached").manifest.recipe
    assert (recipe.stop_gradients, recipe.class_axis) == (("e",), -1)


def test_train_local_follows_them_too(command: Command, tmp_path: Path) -> None:
    data = load_data("30_lost_tie")
    np.savez(tmp_path / "data.npz", ids=data["ids"], next=data["labels"])
    command.succeed(
        "train", MODELS / "30_lost_tie.onnx", "--local", "--data", tmp_path / "data.npz",
        "--labels", "next", "--tie", "shared.weight=onnx::MatMul_1430", "--quiet",
    )  # fmt: skip
    line = command.fail(
        "train", tmp_path, "--server", "ws://localhost:1", "--data", tmp_path / "data.npz",
        "--labels", "next",
    )  # fmt: skip
    assert "--labels" in line


def test_states_are_an_option_of_every_command_that_reads_a_model(
    command: Command, tmp_path: Path
) -> None:
    model, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    onnx.save(build_recurrent(), model)
    rows = draw_data(10)
    np.savez(data, x=rows["x"], labels=rows["labels"])
    assert "cut --state h_out=h_in" in command.succeed("check", model)
    given = ("--dim", f"N={BATCH}", "--state", "h_out=h_in")
    out = command.succeed("check", model, *given)
    assert "20 in states carried from step to step" in out
    assert "cut --state" not in out
    assert "fixed at" not in out  # as a state's batch has to be
    listed = json.loads(command.succeed("inspect", model, *given, "--json"))
    assert [cut["tensor"] for cut in listed] == ["a", "h", "z", "p"]
    pairs = json.loads(command.succeed("inspect", model, "--u-shape", *given, "--json"))
    assert (["a"], ["h"]) in [(pair["at"], pair["tail_at"]) for pair in pairs]
    command.succeed(
        "cut", model, "--at", "a", "--send-labels", "--loss", "mse", *given, "-o", tmp_path / "b"
    )
    assert Bundle.load(tmp_path / "b").manifest.recipe.states == (("h_out", "h_in"),)
    command.succeed(
        "train", model, "--local", "--data", data, "--loss", "mse", "--batch-size", BATCH, *given,
        "-o", tmp_path / "merged.onnx", "--quiet",
    )  # fmt: skip
    merged = onnx.load(tmp_path / "merged.onnx")
    assert [value.name for value in merged.graph.input] == ["x", "h_in"]


def test_check_and_inspect_fix_sizes(command: Command) -> None:
    lengths = MODELS / "11_lstm_dynamic_time.onnx"
    command.succeed("check", lengths, "--dim", "T=6")
    assert "T" in command.succeed("inspect", lengths, "--batch", 2)
    assert "6" in command.succeed("inspect", lengths, "--dim", "T=6", "--batch", 2)


def test_a_wrong_option_is_one_line(command: Command, tmp_path: Path) -> None:
    for option, value, told in (
        ("--dim", "M=3", "no such size"),
        ("--bind", "nothing=3", "no such input"),
        ("--batchnorm", "^nothing=train", "matches no BatchNormalization"),
        ("--tie", "nothing=other", "'nothing'"),
        ("--stop-gradient", "nothing", "'nothing'"),
        ("--state", "nothing=other", "no output 'nothing'"),
        ("--class-axis", "5", "is not an axis"),
    ):
        line = command.fail("cut", MODEL, "--at", AT, option, value, "-o", tmp_path / "bundle")
        assert told in line
    assert not (tmp_path / "bundle").exists()
