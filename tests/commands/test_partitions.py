"""check, inspect, cut and verify, run as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import splitonnx
from splitonnx.bundles import Bundle
from splitonnx.partitioner.cutting.conformance import dataflow
from tests.support.commands import AT, MODEL, TAIL_AT, Command
from tests.support.zoo import ZOO


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


def test_what_is_frozen_is_not_counted_as_trained(command: Command) -> None:
    options = ["--freeze", ".", "--train", r"^head\."]
    found = json.loads(command.succeed("check", MODEL, *options, "--json"))
    trained = [
        weight
        for layer in found["layers"]
        for weight in layer["weights"]
        if weight["role"] == "parameter"
    ]
    assert {weight["name"].split(".")[0] for weight in trained} == {"head"}
    assert 0 < found["parameters"] < 23122
    cuts = json.loads(command.succeed("inspect", MODEL, *options, "--json"))
    (cut,) = [each for each in cuts if each["tensor"] == AT]
    assert (cut["client_parameters"], cut["bytes_down"]) == (0, 0)
    assert cut["server_parameters"] == found["parameters"]
    pairs = json.loads(command.succeed("inspect", MODEL, "--at", AT, *options, "--json"))
    assert all(pair["head_parameters"] == 0 for pair in pairs)
    code, _, told = command("inspect", MODEL, "--freeze", "no such parameter")
    assert code == 2
    assert "no such parameter" in told


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
        "raw": [],
    }


def test_inspect_lists_pairs_for_a_u_shape(command: Command) -> None:
    table = command.succeed("inspect", MODEL, "--u-shape")
    assert TAIL_AT not in table  # the Dropout behind it sends the same
    assert " pairs; " in table
    assert TAIL_AT in command.succeed("inspect", MODEL, "--at", AT)
    assert AT in command.succeed("inspect", MODEL, "--tail-at", TAIL_AT)
    pairs = json.loads(command.succeed("inspect", MODEL, "--u-shape", "--json"))
    pair = next(pair for pair in pairs if (pair["at"], pair["tail_at"]) == ([AT], [TAIL_AT]))
    size = (24 * 8 * 8 + 48 * 2 * 2) * 4
    assert (pair["bytes_up"], pair["bytes_down"]) == (size, size)
    assert (pair["head_parameters"], pair["server_parameters"]) == (264, 20928)
    assert sum(pair["recommended"] for pair in pairs) < len(pairs)
    code, _, err = command("inspect", MODEL, "--u-shape", "--batch", 3)
    assert code == 2
    assert "leave out --batch" in err


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


def test_cut_compares_the_parts_with_the_model(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataflow.run_session

    def run_wrong(*given: Any, level: dataflow.Level) -> list[dict[str, np.ndarray]]:
        made = run(*given, level=level)
        factor = 1 if level == "none" else 2
        return [{name: factor * array for name, array in values.items()} for values in made]

    monkeypatch.setattr(dataflow, "run_session", run_wrong)
    cut = ("cut", MODEL, "--at", AT, "--send-labels", "-o", tmp_path / "bundle")
    line = command.fail(*cut, "--check")
    assert "a mistake in splitonnx, not in the model: what the parts predict differs" in line
    assert not (tmp_path / "bundle").exists()
    command.succeed(*cut, "--no-check")


def test_cut_takes_several_tensors(command: Command, tmp_path: Path) -> None:
    entry = ZOO["two_streams"]
    model, folder = tmp_path / "model.onnx", tmp_path / "bundle"
    onnx.save(entry.build(), model)
    first, second = entry.several
    command.succeed("cut", model, "--at", first, "--at", second, "--send-labels", "-o", folder)
    assert Bundle.load(folder).manifest.recipe.at == (first, second)
    assert f"'{second}'" in command.fail("cut", model, "--at", first, "-o", tmp_path / "other")


def test_cut_as_json_says_what_each_party_holds(command: Command, tmp_path: Path) -> None:
    out = command.succeed(
        "cut", MODEL, "--at", AT, "--send-labels", "-o", tmp_path / "bundle", "--json"
    )
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
    again = ("cut", MODEL, "--at", AT, "--send-labels", "-o", bundle, "--force", "--quiet")
    assert command.succeed(*again) == ""
    assert Bundle.load(bundle).manifest.recipe.tail_at == ()


def test_an_unknown_tensor_is_one_line_with_the_nearest_names(
    command: Command, tmp_path: Path
) -> None:
    line = command.fail("cut", MODEL, "--at", "/block1/Relu_output_1", "-o", tmp_path / "bundle")
    assert "/block1/Relu_output_0" in line
    assert not (tmp_path / "bundle").exists()


def test_a_file_that_is_no_model_is_one_line(command: Command, data: Path) -> None:
    assert "not a usable ONNX model" in command.fail("inspect", data)


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
    splitonnx.cut(MODEL, at=AT, send_labels=True, client_target="portable").save(bundle)
    arguments = ("verify", bundle, "--data", data, "--steps", 2, "--batch-size", 8, "--rtol")
    code, out, _ = command(*arguments, 0)
    assert code == 1
    assert "not equal" in out
    assert command(*arguments, 1e-4)[0] == 0


def test_a_wrong_option_is_told_before_an_output_that_exists(
    command: Command, tmp_path: Path
) -> None:
    line = ("cut", MODEL, "--at", AT, "--send-labels", "-o", tmp_path)
    assert "there is no optimizer 'sdg'" in command.fail(*line, "--optimizer", "sdg")
    assert "write it as" in command.fail(*line, "--dim", "T")
    assert "it exists already" in command.fail(*line)


def test_check_and_inspect_take_the_mode_of_dropout(command: Command) -> None:
    assert "can be trained" in command.succeed("check", MODEL, "--dropout", "off")
    assert AT in command.succeed("inspect", MODEL, "--dropout", "keep")


def test_cut_shows_what_travels_with_a_codec_and_refuses_what_is_none(
    command: Command, tmp_path: Path
) -> None:
    line = ("cut", MODEL, "--at", AT, "--send-labels", "-o", tmp_path / "bundle", "--no-check")
    assert "there is no codec 'int9'" in command.fail(*line, "--wire", "int9")
    shown = command.succeed(*line, "--wire", "fwd=int8,bwd=bf16", "--force")
    assert "as int8 (" in shown
    summary = json.loads(command.succeed(*line, "--wire", "int8", "--force", "--json"))
    assert summary["recipe"]["wire"] == "int8"
    plain = json.loads(command.succeed(*line, "--force", "--json"))
    assert "wire" not in plain["recipe"]
    before, after = (s["leaves"]["train"]["tensors"][0] for s in (plain, summary))
    assert after["bytes_per_sample"] * 4 == before["bytes_per_sample"]
    assert after["bytes_fixed"] > before["bytes_fixed"] == 0


def test_verify_says_that_a_codec_is_part_of_the_difference(
    command: Command, data: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    splitonnx.cut(MODEL, at=AT, send_labels=True, wire="fp16", check=False).save(bundle)
    arguments = ("verify", bundle, "--data", data, "--steps", 2, "--batch-size", 8)
    code, out, _ = command(*arguments)
    assert code == 1
    assert "--wire fp16 rounds what crosses the cut, which --rtol must allow" in out
    code, out, _ = command(*arguments, "--rtol", 0.05, "--json")
    assert (code, json.loads(out.splitlines()[-1])["wire"]) == (0, "fp16")


def test_check_estimates_the_memory_of_a_cut(command: Command) -> None:
    out = command.succeed("check", MODEL, "--at", AT, "--batch", 32)
    assert "memory of the client for 32 samples:" in out
    assert "with --recompute" in out
    found = json.loads(command.succeed("check", MODEL, "--at", AT, "--batch", 32, "--json"))
    client, server = found["memory"]
    assert (client["party"], client["batch"], server["party"]) == ("client", 32, "server")
    assert client["stash"] > client["stash_recomputed"] == 0
    assert "name the cut with --at" in command.fail("check", MODEL, "--batch", 32)


def test_cut_lets_a_part_compute_its_forward_stage_again(command: Command, tmp_path: Path) -> None:
    line = ["cut", MODEL, "--at", AT, "--send-labels", "-o", tmp_path / "bundle", "--no-check"]
    made = json.loads(command.succeed(*line, "--recompute", "client", "--json"))
    assert made["recipe"]["recompute"] == ["client"]
    assert "head.recompute" in made["parties"]["client"]["stages"]
    assert "choose client" in command.fail(*line, "--recompute", "server", "--force")
    assert "both" in command.fail(*line, "--recompute", "head", "--force")
