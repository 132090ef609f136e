"""The command line, run as a user runs it: what it prints, what it writes, how it fails."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import splitonnx
from splitonnx.bundles import Bundle
from splitonnx.commands import main
from splitonnx.runtime.server.servers import Server
from tests.support.zoo import ZOO

MODEL = Path(__file__).parents[2] / "examples" / "digits.onnx"
AT, TAIL_AT = "/block1/Relu_output_0", "/block3/MaxPool_1_output_0"
SAMPLES = 24


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


class Command:
    """Runs the entry point in this process: ``command(...)`` gives exit code, stdout, stderr."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch = patch
        self._capture = capture

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._patch.setattr(sys, "argv", ["splitonnx", *map(str, arguments)])
        self._capture.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            gc.enable()  # this process does not end with the command
        captured = self._capture.readouterr()
        assert code is None or isinstance(code, int)
        return code or 0, captured.out, captured.err

    def succeed(self, *arguments: object) -> str:
        """Run it, expect success and an empty stderr but for progress, and give stdout."""
        code, out, err = self(*arguments)
        assert code == 0, err
        return out

    def fail(self, *arguments: object) -> str:
        """Run it, expect exit code 2 and one line on stderr, and give that line."""
        code, out, err = self(*arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        return err


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.npz"
    random = np.random.default_rng(0)
    image = random.random((SAMPLES, 1, 8, 8), np.float32)
    np.savez(path, image=image, labels=random.integers(0, 10, SAMPLES))
    return path


def test_check_says_what_becomes_of_a_model(command: Command) -> None:
    out = command.succeed("check", MODEL)
    assert "can be trained" in out
    assert "23,122 to train" in out
    found = json.loads(command.succeed("check", MODEL, "--json"))
    assert {use["operator"] for use in found["operators"]} >= {"Conv", "Gemm"}
    assert found["obstacles"] == []
    code, out, _ = command("check", MODEL, "--loss", "from-model")
    assert code == 1
    assert "cannot be trained" in out


@pytest.fixture(scope="session")
def cut_once() -> Bundle:
    return splitonnx.cut(MODEL, at=AT, tail_at=TAIL_AT)


@pytest.fixture
def bundle(cut_once: Bundle, tmp_path: Path) -> Path:
    cut_once.save(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def url(bundle: Path) -> Iterator[str]:
    with Server(bundle / "server", port=0, threads=1) as server:
        yield server.url


def test_help_names_every_command(command: Command) -> None:
    out = command.succeed("--help")
    for name in ("inspect", "cut", "serve", "train", "predict", "merge", "verify"):
        assert f" {name} " in out
        assert "--" in command.succeed(name, "--help")


def test_help_needs_neither_onnx_nor_numpy() -> None:
    script = """
import sys
sys.argv = ["splitonnx", "train", "--help"]
from splitonnx.commands import main
try:
    main()
except SystemExit:
    pass
print(sorted({"onnx", "onnx_ir", "onnxruntime", "numpy", "websockets"} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["check", "inspect", "cut"])
def test_a_command_that_ends_with_its_model_leaves_the_memory_to_the_system(
    name: str, tmp_path: Path
) -> None:
    script = """
import atexit, gc
from splitonnx.commands import main
# runs behind what the command registers
atexit.register(lambda: print(gc.isenabled(), len(gc.get_objects()), gc.get_freeze_count() > 1e5))
main()
"""
    options = ["--at", AT, "-o", str(tmp_path / "bundle")] if name == "cut" else []
    done = subprocess.run(
        [sys.executable, "-c", script, name, str(MODEL), *options],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "False 0 True"  # off, and nothing is left to look at


def test_inspect_lists_cuts_as_a_table_and_as_json(command: Command) -> None:
    table = command.succeed("inspect", MODEL, "--batch", 32)
    assert "/block1/Relu_output_0" in table
    assert "32 x 24 x 8 x 8" in table
    cuts = json.loads(command.succeed("inspect", MODEL, "--batch", 32, "--json"))
    found = next(cut for cut in cuts if cut["tensor"] == AT)
    size = 32 * 24 * 8 * 8 * 4
    assert found == {
        "tensor": AT,
        "op": "Relu",
        "shape": [32, 24, 8, 8],
        "bytes_up": size,
        "bytes_down": size,
        "client_parameters": 264,
        "server_parameters": 22858,
        "sent": [],
    }


def test_cut_writes_a_bundle_with_the_options_given(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    out = command.succeed(
        "cut", MODEL, "--at", AT, "--tail-at", TAIL_AT, "--optimizer", "sgd", "--lr", 0.05,
        "--momentum", 0.9, "--weight-decay", 0.01, "--clip-norm", 1, "--batchnorm", "frozen",
        "--dropout", "off", "--freeze", "^block1", "--client-target", "portable",
        "--server-target", "training", "--output", "logits", "-o", folder,
    )  # fmt: skip
    assert "U-shaped" in out
    recipe = Bundle.load(folder).manifest.recipe
    assert (recipe.at, recipe.tail_at, recipe.output) == ((AT,), (TAIL_AT,), "logits")
    assert recipe.optimizer == {
        "name": "sgd",
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
    }
    assert (recipe.batchnorm, recipe.dropout, recipe.freeze) == ("frozen", "off", ("^block1",))
    assert (recipe.client_target, recipe.server_target) == ("portable", "training")


def test_cut_takes_several_tensors(command: Command, tmp_path: Path) -> None:
    entry = ZOO["two_streams"]
    model, folder = tmp_path / "model.onnx", tmp_path / "bundle"
    onnx.save(entry.build(), model)
    first, second = entry.several
    command.succeed("cut", model, "--at", first, "--at", second, "-o", folder)
    assert Bundle.load(folder).manifest.recipe.at == (first, second)
    assert f"'{second}'" in command.fail("cut", model, "--at", first, "-o", tmp_path / "other")


def test_cut_as_json_says_what_each_party_holds(command: Command, tmp_path: Path) -> None:
    out = command.succeed("cut", MODEL, "--at", AT, "-o", tmp_path / "bundle", "--json")
    summary = json.loads(out)
    assert summary["recipe"]["at"] == [AT]
    assert summary["parties"]["client"]["parameters"] == 264
    assert {wire["kind"] for wire in summary["parties"]["client"]["sends"]} == {
        "activation",
        "input",
    }


def test_an_existing_bundle_is_replaced_with_force_only(command: Command, bundle: Path) -> None:
    assert "--force" in command.fail("cut", MODEL, "--at", AT, "-o", bundle)
    assert Bundle.load(bundle).manifest.recipe.tail_at == (TAIL_AT,)
    assert command.succeed("cut", MODEL, "--at", AT, "-o", bundle, "--force", "--quiet") == ""
    assert Bundle.load(bundle).manifest.recipe.tail_at == ()


def test_an_unknown_tensor_is_one_line_with_the_nearest_names(
    command: Command, tmp_path: Path
) -> None:
    line = command.fail("cut", MODEL, "--at", "/block1/Relu_output_1", "-o", tmp_path / "bundle")
    assert "/block1/Relu_output_0" in line
    assert not (tmp_path / "bundle").exists()


def test_a_setting_that_the_optimizer_lacks_is_refused(command: Command, tmp_path: Path) -> None:
    line = command.fail("cut", MODEL, "--at", AT, "--momentum", 0.9, "-o", tmp_path / "bundle")
    assert "adamw has no setting 'momentum'" in line


def test_a_file_that_is_no_model_is_one_line(command: Command, data: Path) -> None:
    assert "not a usable ONNX model" in command.fail("inspect", data)


def test_training_prints_a_line_of_json_a_step(
    command: Command, bundle: Path, url: str, data: Path
) -> None:
    out = command.succeed(
        "train", bundle / "client", "--server", url, "--data", data, "--eval-data", data,
        "--epochs", 2, "--batch-size", 8, "--seed", 3, "--threads", 1, "--json",
    )  # fmt: skip
    records = [json.loads(line) for line in out.splitlines()]
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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--server", "ws://127.0.0.1:1", "--local"], "--local and --server exclude each other"),
        (["--local", "--json", "--quiet"], "--json and --quiet exclude each other"),
        (["--local", "--force"], "-o"),
        ([], "--server"),
        (["--server", "ws://127.0.0.1:1", "--loss", "mse"], "--loss"),
        (["--server", "ws://127.0.0.1:1", "--freeze", "x", "-o", "t.onnx"], "-o, --freeze"),
        (["--server", "ws://127.0.0.1:1", "--dropout", "off"], "--dropout"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(
    command: Command, data: Path, arguments: list[str], expected: str
) -> None:
    assert expected in command.fail("train", MODEL, "--data", data, *arguments)


def test_a_server_that_is_not_there_is_one_line(command: Command, bundle: Path, data: Path) -> None:
    line = command.fail("train", bundle / "client", "--server", "ws://127.0.0.1:1", "--data", data)
    assert "ws://127.0.0.1:1" in line


def test_a_port_in_use_is_one_line(
    command: Command, bundle: Path, url: str, tmp_path: Path
) -> None:
    port = url.rsplit(":", 1)[1]
    shutil.copytree(bundle / "server", tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    assert f"port {port}" in command.fail("serve", tmp_path / "copy", "--port", port)


def test_a_folder_in_use_is_one_line(command: Command, bundle: Path, url: str) -> None:
    assert "is in use by" in command.fail("serve", bundle / "server", "--port", 0)


def test_verify_compares_each_step(command: Command, bundle: Path, data: Path) -> None:
    arguments = ("verify", bundle, "--data", data, "--steps", 2, "--batch-size", 8)
    assert "equal: largest relative difference" in command.succeed(*arguments)
    *steps, verdict = map(json.loads, command.succeed(*arguments, "--json").splitlines())
    assert [step["step"] for step in steps] == [1, 2]
    assert verdict["ok"]
    assert verdict["largest_difference"] <= verdict["rtol"]


def test_verify_exits_with_1_where_split_and_unsplit_differ(
    command: Command, data: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    splitonnx.cut(MODEL, at=AT, client_target="portable").save(bundle)
    arguments = ("verify", bundle, "--data", data, "--steps", 2, "--batch-size", 8, "--rtol")
    code, out, _ = command(*arguments, 0)
    assert code == 1
    assert "not equal" in out
    assert command(*arguments, 1e-4)[0] == 0


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


def test_serve_says_where_and_stops_when_told(bundle: Path) -> None:
    process = start("serve", bundle / "server", "--port", 0)
    assert process.stderr is not None
    assert "serving on ws://127.0.0.1:" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped" in err.splitlines()[-1]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "splitonnx", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["cut"], "Missing argument"),
        (["cut", MODEL, "-o", "bundle"], "--at"),
        (["cut", MODEL, "--speed", "11"], "--speed"),
        (["serve", "bundle/server", "--port", "99999"], "--port"),
        (["inspect", MODEL, "--batch", "0"], "--batch"),
        (["explode"], "explode"),
    ],
)
def test_a_slip_in_the_command_line_is_one_line_too(
    command: Command, words: list[object], reason: str
) -> None:
    assert reason in command.fail(*words)
