"""Tests of the command ``explain``, and of what other commands print about what leaves."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import splitonnx
from splitonnx.bundles import Bundle
from splitonnx.commands.disclosures import RunDisclosure
from splitonnx.runtime.channels.greetings import SharingTerms
from splitonnx.runtime.client.datasets import open_dataset
from tests.support.carried import BATCH, build_delayed, draw_data
from tests.support.commands import AT, MODEL, TAIL_AT, Command, start
from tests.support.zoo import ZOO

HEAD = f"activation '{AT}' F32"
TAIL = f"gradient of '{TAIL_AT}' F32"
UP, DOWN = 24 * 8 * 8 * 4, 48 * 2 * 2 * 4
"""Bytes of a sample: its activation, and the gradient of what came back."""


def test_explain_shows_what_leaves_with_the_proof(command: Command, bundle: Path) -> None:
    lines = command.succeed("explain", bundle / "client", "--batch", 4).splitlines()
    assert lines[:3] == [
        "train, per step of 4",
        f"  leaves: {HEAD}[4, 24, 8, 8] ({4 * UP:,} bytes), "
        f"{TAIL}[4, 48, 2, 2] ({4 * DOWN:,} bytes)",
        f"  comes in: activation '{TAIL_AT}' F32[4, 48, 2, 2] ({4 * DOWN:,} bytes), "
        f"gradient of '{AT}' F32[4, 24, 8, 8] ({4 * UP:,} bytes)",
    ]
    image = "  raw input 'image' F32[N, 1, 8, 8]: "
    weight = "Conv '/block1/conv1/Conv' (block1.conv1.weight)"
    assert f"{image}activation '{AT}' depends on it through {weight}" in lines
    stays = "  labels 'labels' I64[N]: stays here: no path leads from it to anything that leaves"
    assert lines.index(stays) > lines.index("evaluate, per step of 4, after predicting")
    assert sum(line.startswith("  proof: the graphs of ") for line in lines) == 5
    assert "a token if there is one" in lines[-1]


def test_explain_as_json_has_the_same_facts(command: Command, bundle: Path) -> None:
    found = json.loads(command.succeed("explain", bundle / "client", "--batch", 4, "--json"))
    train, predict, evaluate, accumulate, _, share = found["phases"]
    assert accumulate["leaves"]["tensors"][:-1] == train["leaves"]["tensors"]
    assert (train["phase"], train["leaves"]["bytes"]) == ("train", 4 * (UP + DOWN))
    assert (predict["leaves"]["bytes"], evaluate["leaves"]["bytes"]) == (4 * UP, 0)
    own = [tensor for tensor in share["leaves"]["tensors"] if tensor["wire"].endswith("@own")]
    assert {tensor["kind"] for tensor in own} == {"parameter"}
    (labels,) = evaluate["arrays"]
    assert (labels["kind"], labels["ways"]) == ("labels", [])
    printed = command.succeed("explain", bundle / "client", "--batch", 4)
    for phase in found["phases"]:
        for array in phase["arrays"]:
            assert all(sentence in printed for sentence in array["sentences"])
    assert found["digest"] == Bundle.load(bundle).manifest.digest


def test_names_in_a_bundle_of_others_cannot_steer_the_terminal(
    command: Command, bundle: Path
) -> None:
    party = Bundle.load(bundle).client
    wires = [
        msgspec.structs.replace(
            wire,
            tensor=msgspec.structs.replace(wire.tensor, name=f"\x1b[2J{wire.tensor.name}"),
        )
        for wire in party.manifest.phase("train").wires
    ]
    phase = msgspec.structs.replace(party.manifest.phase("train"), wires=tuple(wires))
    manifest = msgspec.structs.replace(party.manifest, phases=(phase,))
    replace(party, manifest=manifest).save(bundle / "client", overwrite=True)
    out = command.succeed("explain", bundle / "client")
    assert "\x1b" not in out
    assert "\\x1b[2J" in out


def test_explain_reads_a_clients_folder_only(command: Command, bundle: Path) -> None:
    line = command.fail("explain", bundle / "server")
    assert "this is the server's part; explain reads the client's" in line


def test_cut_prints_what_leaves_the_client(command: Command, tmp_path: Path) -> None:
    words = ("cut", MODEL, "--at", AT, "--send-labels", "--force", "-o", tmp_path / "bundle")
    lines = command.succeed(*words).splitlines()
    assert lines[-2:] == [
        f"leaves the client per step: {HEAD}[N, 24, 8, 8] ({UP:,} bytes a sample), "
        "labels I64[N] (8 bytes a sample)",
        f"leaves the client per batch to predict: {HEAD}[N, 24, 8, 8] ({UP:,} bytes a sample)",
    ]
    leaves = json.loads(command.succeed(*words, "--json"))["leaves"]
    assert [t["kind"] for t in leaves["train"]["tensors"]] == ["activation", "labels"]
    assert [t["kind"] for t in leaves["predict"]["tensors"]] == ["activation"]


@pytest.mark.parametrize(
    ("at", "option"), [(AT, "--send-labels"), ("image", "--send-input image --send-labels")]
)
def test_what_a_refusal_advises_lets_the_cut_be_made(
    command: Command, tmp_path: Path, at: str, option: str
) -> None:
    given = ["cut", MODEL, "--at", at, "-o", tmp_path / "bundle"]
    line = command.fail(*given)
    advised = line.partition("add ")[2].partition(" (in Python")[0]
    assert advised == option
    command.succeed(*given, *shlex.split(advised))


def test_train_prints_what_leaves_per_step_and_in_all(
    command: Command, bundle: Path, url: str, data: Path
) -> None:
    words = ("train", bundle / "client", "--server", url, "--data", data, "--eval-data", data)
    lines = command.succeed(*words, "--epochs", 2, "--batch-size", 10).splitlines()
    assert lines[:2] == [
        f"leaves the client per step of 10: {HEAD}[10, 24, 8, 8] ({10 * UP:,} bytes), "
        f"{TAIL}[10, 48, 2, 2] ({10 * DOWN:,} bytes); in all 6 steps of a whole run: "
        f"{2 * 24 * (UP + DOWN):,} bytes",
        f"leaves the client per batch to predict of 10: {HEAD}[10, 24, 8, 8] ({10 * UP:,} bytes); "
        f"in all 6 batches to evaluate after each epoch: {2 * 24 * UP:,} bytes",
    ]
    first, *_ = command.succeed(*words, "--json", "--restart").splitlines()
    assert json.loads(first)["leaves"]["train"]["total_bytes"] == 24 * (UP + DOWN)
    assert command.succeed(*words, "--quiet", "--restart") == ""


def test_a_model_that_is_trained_here_sends_nothing_and_says_nothing(
    command: Command, data: Path
) -> None:
    assert "leaves" not in command.succeed("train", MODEL, "--local", "--data", data)


def test_serve_logs_what_its_clients_send(bundle: Path) -> None:
    with start("serve", bundle / "server", "--port", 0, "--log-format", "json") as process:
        try:
            assert process.stderr is not None
            events = [json.loads(process.stderr.readline())["event"] for _ in range(2)]
        finally:
            process.kill()
    assert events[0].startswith("serving on ")
    assert events[1] == (
        f"leaves the client per step: {HEAD}[N, 24, 8, 8] ({UP:,} bytes a sample), "
        f"{TAIL}[N, 48, 2, 2] ({DOWN:,} bytes a sample)"
    )


def test_explain_says_that_a_gradient_tells_the_labels(command: Command, tmp_path: Path) -> None:
    bare = splitonnx.cut(ZOO["chain"].build(), at="act1", tail_at="linear4", send_labels=True)
    bare.save(tmp_path / "bare")
    sentence = "so the server can compute the labels from it"
    assert sentence in command.succeed("explain", tmp_path / "bare/client")
    mixed = splitonnx.cut(ZOO["chain"].build(), at="act1", tail_at="act3")
    mixed.save(tmp_path / "mixed")
    assert sentence not in command.succeed("explain", tmp_path / "mixed/client")


def test_states_with_raw_inputs_are_named_and_written_only_on_request(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    initial, rows = np.zeros((BATCH, 3), np.float32), draw_data(2 * BATCH)
    model, data, made = (tmp_path / name for name in ("model.onnx", "data.npz", "bundle"))
    onnx.save(build_delayed(initial), model)
    np.savez(data, **rows)  # type: ignore[arg-type]
    options = ("--loss", "mse", "--dim", f"N={BATCH}", "--state", "after=before")
    told = (
        "the client keeps raw data: the state 'before' holds raw input 'x' of the step before, "
        "here and in checkpoints; merge leaves it out unless --raw-states is given"
    )
    cut = command.succeed("cut", model, "--at", "z", *options, "--send-labels", "-o", made)
    assert told in cut.splitlines()
    assert told in command.succeed("explain", made / "client").splitlines()
    explained = json.loads(command.succeed("explain", made / "client", "--json"))
    assert explained["raw_states"] == {"before": ["x"]}
    dataset = open_dataset(data)
    manifest = Bundle.load(made).client.manifest
    disclosure = RunDisclosure(
        manifest, dataset, None, terms=SharingTerms(), epochs=1, batch_size=BATCH
    )
    disclosure.show(as_json=False)
    assert told in capsys.readouterr().out.splitlines()
    train = ("train", model, "--local", "--data", data, *options, "--batch-size", BATCH)
    expected = {(): initial, ("--raw-states",): rows["x"][BATCH:]}
    for given, value in expected.items():
        merged = tmp_path / f"merged{len(given)}.onnx"
        command.succeed(*train, "--no-shuffle", "-o", merged, *given)
        (stored,) = [t for t in onnx.load(merged).graph.initializer if t.name == "before"]
        np.testing.assert_array_equal(numpy_helper.to_array(stored), value)
    assert "--raw-states needs an output" in command.fail(*train, "--raw-states")
