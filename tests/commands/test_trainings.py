"""train, run as a user runs it: against a server, and on a model left whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from splitonnx.bundles import Bundle
from tests.support.carried import build_recurrent, draw_data
from tests.support.commands import MODEL, SAMPLES, Command, start
from tests.support.interrupts import lose_interrupt, taking_interrupts
from tests.support.packed_models import build_packed, draw_packed


def test_training_prints_a_line_of_json_a_step(
    command: Command, bundle: Path, url: str, data: Path
) -> None:
    out = command.succeed(
        "train", bundle / "client", "--server", url, "--data", data, "--eval-data", data,
        "--epochs", 2, "--batch-size", 8, "--seed", 3, "--threads", 1, "--json",
    )  # fmt: skip
    records = [json.loads(line) for line in out.splitlines()]
    disclosed = records.pop(0)["leaves"]
    peak = records.pop()["memory"]["peak_bytes"]
    assert 1e7 < peak < 1e11
    assert {phase: part["steps"] for phase, part in disclosed.items()} == {"train": 6, "predict": 6}
    steps = [record for record in records if "step" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in records if "step" not in record] == [0, 1]
    for record in steps:
        assert record["samples"] == 8
        assert record["bytes_up"] > 8 * 24 * 8 * 8 * 4
        assert set(record["metrics"]) == {"accuracy"}
    assert Bundle.load(bundle).client.step == 6


def test_training_shows_its_figures_and_saves_both_halves(
    command: Command, bundle: Path, url: str, data: Path, tmp_path: Path
) -> None:
    arguments = ("train", bundle / "client", "--server", url, "--data", data, "--batch-size", 8)
    code, out, err = command(*arguments, "--eval-data", data)
    assert code == 0
    for word in ("samples/s", "loss", "accuracy", "held out", "up", "down", "3/3"):
        assert word in err
    assert "held-out accuracy" in out
    loaded = Bundle.load(bundle)
    assert loaded.server is not None
    assert (loaded.client.step, loaded.server.step) == (3, 3)

    assert command(*arguments, "--quiet") == (0, "", "")

    merged, predictions = tmp_path / "trained.onnx", tmp_path / "predictions.npz"
    command.succeed("merge", bundle, "-o", merged)
    assert [value.name for value in onnx.load(merged).graph.output] == ["logits"]
    out = command.succeed(
        "predict", bundle / "client", "--server", url, "--data", data, "-o", predictions
    )
    assert f"F32[{SAMPLES}, 10]" in out
    assert np.load(predictions)["logits"].shape == (SAMPLES, 10)
    assert "--force" in command.fail("merge", bundle, "-o", merged)
    assert "--force" in command.fail(
        "predict", bundle / "client", "--server", url, "--data", data, "-o", predictions
    )


def test_the_learning_rate_of_train_replaces_the_bundle_s(
    command: Command, bundle: Path, url: str, data: Path
) -> None:
    weight = "block1.conv1.weight"
    before = Bundle.load(bundle).client.state()[weight].copy()
    command.succeed(
        "train", bundle / "client", "--server", url, "--data", data, "--lr", 0, "--quiet"
    )
    np.testing.assert_array_equal(Bundle.load(bundle).client.state()[weight], before)


def test_a_model_left_whole_trains_locally(command: Command, data: Path, tmp_path: Path) -> None:
    trained = tmp_path / "new" / "trained.onnx"
    out = command.succeed(
        "train", MODEL, "--local", "--data", data, "--batch-size", 8, "--optimizer", "sgd",
        "--lr", 0.1, "-o", trained,
    )  # fmt: skip
    assert f"saved as {trained}" in "".join(out.splitlines())
    before = {tensor.name: tensor.raw_data for tensor in onnx.load(MODEL).graph.initializer}
    after = {tensor.name: tensor.raw_data for tensor in onnx.load(trained).graph.initializer}
    assert before["head.linear.weight"] != after["head.linear.weight"]
    assert os.listdir(trained.parent) == ["trained.onnx"]


def test_micro_batches_change_neither_the_steps_nor_their_samples(
    command: Command, data: Path
) -> None:
    train = ["train", MODEL, "--local", "--data", data, "--batch-size", 8, "--json"]
    lines = [
        [json.loads(line) for line in command.succeed(*train, *more).splitlines()][:-1]
        for more in ([], ["--accumulate", 3])
    ]
    whole, parted = ([(line["step"], line["samples"]) for line in each] for each in lines)
    assert whole == parted
    assert lines[0][0]["loss"] != lines[1][0]["loss"]  # BatchNormalization is by micro-batch


def test_the_learning_rate_follows_a_schedule(command: Command, data: Path) -> None:
    out = command.succeed(
        "train", MODEL, "--local", "--data", data, "--batch-size", 8, "--epochs", 2, "--lr", 0.1,
        "--lr-schedule", "linear", "--warmup", 2, "--json",
    )  # fmt: skip
    *steps, _ = map(json.loads, out.splitlines())
    rates = [line["learning_rate"] for line in steps]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.075, 0.05, 0.025])


def test_the_comparison_with_the_model_can_be_left_out_as_its_messages_advise(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = tmp_path / "packed.onnx", tmp_path / "packed.npz"
    onnx.save(build_packed(level=4), model)
    np.savez(data, x=draw_packed()["x"], labels=np.zeros((4, 2), np.float32))
    train = ["train", model, "--local", "--data", data, "--loss", "mse", "--quiet"]
    command.succeed(*train, "--no-check")
    assert not caplog.messages
    command.succeed(*train, "--check")
    assert "rounds activations to 8 bits" in caplog.messages[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--server", "ws://127.0.0.1:1", "--local"], "--local and --server exclude each other"),
        (["--local", "--json", "--quiet"], "--json and --quiet exclude each other"),
        (["--local", "--force"], "-o"),
        (["--local", "--lr-schedule", "step"], "step=step-size:30epochs"),
        ([], "--server"),
        (["--server", "ws://127.0.0.1:1", "--loss", "mse"], "--loss"),
        (["--server", "ws://127.0.0.1:1", "--freeze", "x", "-o", "t.onnx"], "-o, --freeze"),
        (["--server", "ws://127.0.0.1:1", "--dropout", "off"], "--dropout"),
        (["--server", "ws://127.0.0.1:1", "--no-check"], "--no-check: with --local only"),
        (["--server", "ws://127.0.0.1:1", "--check"], "--check: with --local only"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(
    command: Command, data: Path, arguments: list[str], expected: str
) -> None:
    assert expected in command.fail("train", MODEL, "--data", data, *arguments)


def test_data_and_warmup_are_refused_before_a_server_is_called(
    command: Command, bundle: Path, data: Path, tmp_path: Path
) -> None:
    nowhere = ("--server", "ws://127.0.0.1:9")
    late = command.fail("train", bundle / "client", "--data", data, *nowhere, "--warmup", "5000")
    assert "the warmup of 5000 steps must be shorter than the training, which has" in late
    missing = tmp_path / "missing.npz"
    assert "missing.npz" in command.fail("train", bundle / "client", "--data", missing, *nowhere)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((("--micro-batches", 2), ("--in-flight", 17)), "in_flight must be from 1 to 16, not 17"),
        ((("--micro-batches", 2), ("--accumulate", 2)), "give one of them"),
        ((("--in-flight", 4),), "give --micro-batches, too"),
    ],
)
def test_numbers_of_micro_batches_are_refused_before_a_server_is_called(
    command: Command,
    bundle: Path,
    data: Path,
    options: tuple[tuple[str, int], ...],
    reason: str,
) -> None:
    words = [word for option in options for word in option]
    nowhere = ("--server", "ws://127.0.0.1:9")
    found = command.fail("train", bundle / "client", "--data", data, *nowhere, *words)
    assert reason in " ".join(found.split())


def test_data_and_warmup_are_refused_before_a_model_is_prepared(
    command: Command, data: Path, tmp_path: Path
) -> None:
    model = tmp_path / "no_model.onnx"
    late = command.fail("train", model, "--local", "--data", data, "--warmup", "1000epochs")
    assert "must be shorter than the training" in late
    missing = tmp_path / "missing.npz"
    assert "missing.npz" in command.fail("train", model, "--local", "--data", missing)


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_a_provider_that_is_not_installed_is_one_line_with_what_to_install(
    name: str, command: Command, bundle: Path, url: str, data: Path, tmp_path: Path
) -> None:
    output = ["-o", tmp_path / "out.npz"] if name == "predict" else []
    given = ["--server", url, "--data", data, "--provider", "openvino", *output]
    error = command.fail(name, bundle / "client", *given)
    assert "install splitonnx[openvino] in an environment of its own" in error


def test_a_server_that_is_not_there_is_one_line(command: Command, bundle: Path, data: Path) -> None:
    line = command.fail("train", bundle / "client", "--server", "ws://127.0.0.1:1", "--data", data)
    assert "ws://127.0.0.1:1" in line


def test_an_interrupt_ends_training_with_130(bundle: Path, url: str, data: Path) -> None:
    process = start(
        "train", bundle / "client", "--server", url, "--data", data, "--epochs", 100000, "--json"
    )
    assert process.stdout is not None
    process.stdout.readline()  # training goes on
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert Bundle.load(bundle).client.step == 0


@pytest.mark.parametrize("is_local", [False, True])
def test_an_interrupt_whose_exception_other_code_discards_ends_training_before_the_next_step(
    command: Command,
    bundle: Path,
    url: str,
    data: Path,
    is_local: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose, orders = np.random.default_rng, []

    def choose_and_lose(seed: list[int]) -> np.random.Generator:
        orders.append(seed)
        if len(orders) == 2:
            lose_interrupt()
        return choose(seed)

    source = (MODEL, "--local") if is_local else (bundle / "client", "--server", url)
    arguments = (*source, "--data", data, "--epochs", 3, "--batch-size", 8, "--seed", 3)
    monkeypatch.setattr(np.random, "default_rng", choose_and_lose)
    with taking_interrupts():
        code, out, _ = command("train", *arguments, "--json")
    steps = [record for record in map(json.loads, out.splitlines()) if "step" in record]
    assert code == 130
    assert [record["epoch"] for record in steps] == [0, 0, 0]


INTERRUPTED_IMPORT = """
import abc, collections.abc, signal, sys
from splitonnx.commands import main
register = abc.ABCMeta.register

def interrupt_and_register(cls, kind):
    if cls is collections.abc.Sequence and "numpy.random" in sys.modules:
        abc.ABCMeta.register = register
        print("interrupted", file=sys.stderr, flush=True)
        signal.raise_signal(signal.SIGINT)
    return register(cls, kind)

signal.signal(signal.SIGINT, signal.default_int_handler)
abc.ABCMeta.register = interrupt_and_register
sys.argv[0] = "splitonnx"
main()
"""
"""Ctrl-C where numpy's compiled modules discard every exception while they are imported."""


def test_an_interrupt_while_numpy_imports_its_random_numbers_ends_training(
    bundle: Path, url: str, data: Path
) -> None:
    """On earlier versions training continues, and the exit code is 0."""
    done = subprocess.run(
        [
            sys.executable, "-c", INTERRUPTED_IMPORT, "train", bundle / "client", "--server", url,
            "--data", data, "--json",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr.startswith("interrupted\ninterrupted at step 0; ")
    assert done.returncode == 130
    assert Bundle.load(bundle).client.step == 0


def test_data_are_taken_in_their_own_order_without_shuffling(
    command: Command, tmp_path: Path
) -> None:
    """The first batch is the first rows, so its loss is that of the model as it is."""
    model, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    onnx.save(build_recurrent(), model)
    rows = draw_data(12)
    np.savez(data, x=rows["x"], labels=rows["labels"])
    losses = {}
    for order in ("--no-shuffle", "--shuffle"):
        out = command.succeed(
            "train", model, "--local", "--data", data, "--loss", "mse", "--batch-size", 4, order,
            "--dim", "N=4", "--state", "h_out=h_in", "--json",
        )  # fmt: skip
        records = [json.loads(line) for line in out.splitlines()]
        losses[order] = [record["loss"] for record in records if "step" in record]
    given = {"x": rows["x"][:4], "h_in": np.zeros((4, 5), np.float32)}
    results = ReferenceEvaluator(onnx.load(model)).run(None, given)
    assert isinstance(results, list)
    expected = float(((np.asarray(results[0]) - rows["labels"][:4]) ** 2).mean())
    np.testing.assert_allclose(losses["--no-shuffle"][0], expected, rtol=1e-5)
    assert losses["--shuffle"][0] != losses["--no-shuffle"][0]
