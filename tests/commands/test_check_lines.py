"""How a check is written: layers with what is trained of them, remarks, options to copy."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from splitonnx.commands.check_lines import MOST_ROWS, format_layers, format_remarks
from splitonnx.manifests import Role
from splitonnx.partitioner.reports.layers import Layer, LayerWeight
from splitonnx.partitioner.reports.remarks import Kind, Remark
from tests.partitioner.reports.test_checks import build_two_heads
from tests.support.commands import MODEL, Command
from tests.support.small_models import MODELS


def make_layer(
    name: str,
    elements: int,
    *,
    own: str = "",
    role: Role = Role.PARAMETER,
    doubt: str | None = None,
) -> Layer:
    weight = LayerWeight(
        name=own or f"{name}.weight", shape=(2, elements // 2), elements=elements, role=role,
        doubt=doubt,
    )  # fmt: skip
    return Layer(name=name, operators=("MatMul",), weights=(weight,))


def test_layers_stand_in_rows_with_the_doubts_below() -> None:
    layers = [
        make_layer("encoder.0", 1200),
        make_layer("add_node", 8, own="pe", role=Role.FROZEN, doubt="sines and cosines"),
    ]
    assert list(format_layers(layers, 80)) == [
        " trained   frozen   layer",
        " ----------------------------------------",
        "   1,200            encoder.0 (MatMul)",
        "                8   add_node (MatMul): pe",
        "                    ? pe (2 x 4): sines and cosines",
    ]


def test_many_layers_are_joined_by_the_first_parts_of_their_names() -> None:
    layers = [make_layer(f"stack.{i}.part{j}", 4) for i in range(MOST_ROWS // 2) for j in range(3)]
    rows = list(format_layers(layers, None))[2:]
    assert len(rows) == MOST_ROWS // 2
    assert rows[0].split() == ["12", "stack.0", "(MatMul)"]


@pytest.mark.parametrize("width", [80, 120])
def test_sentences_are_wrapped_and_options_are_not(width: int) -> None:
    option = f"--freeze '^({'|'.join(f'layers.{i}.pe' for i in range(20))})$'"
    remark = Remark(
        kind=Kind.COMPUTED_TABLE, sentence="word " * 60 + "end", options=(option, "--tie a=b")
    )
    *sentence, first, second = format_remarks([remark], width)
    assert all(len(line) <= width for line in sentence)
    assert len(sentence) > 2
    assert sentence[0].startswith("remark: word")
    assert first == f"        cut {option}"
    assert second == "        or --tie a=b"


def test_into_a_pipe_a_sentence_is_one_line() -> None:
    remark = Remark(kind=Kind.QUANTIZED, sentence="word " * 60 + "end")
    assert len(list(format_remarks([remark], None))) == 1


def test_text_of_the_file_neither_starts_lines_nor_reaches_the_terminal_raw() -> None:
    remark = Remark(kind=Kind.LOST_TIE, sentence="one\x1b[2J\nremark: two")
    assert list(format_remarks([remark], None)) == ["remark: one\\x1b[2J remark: two"]


def test_a_model_without_weights_has_no_table() -> None:
    assert list(format_layers([], 80)) == []


def test_the_command_shows_layers_reasons_and_options(command: Command) -> None:
    out = command.succeed("check", MODELS / "08_buffers.onnx")
    assert "? pe (1 x 36 x 6): sines and cosines" in out
    assert "? mean (1 x 3 x 1 x 1): scales or shifts a raw input" in out
    assert "\n        cut --freeze '^(pe|dft)$'\n" in out
    found = json.loads(command.succeed("check", MODELS / "08_buffers.onnx", "--json"))
    assert [remark["options"] for remark in found["remarks"]] == [
        ["--train '^(mean|std)$'"],
        ["--freeze '^(pe|dft)$'"],
    ]
    doubts = {w["name"]: w["doubt"] for layer in found["layers"] for w in layer["weights"]}
    assert {name for name, doubt in doubts.items() if doubt} == {"mean", "std", "pe", "dft"}


def test_the_command_shows_the_parameters_of_each_group(command: Command) -> None:
    groups = (
        "--param-group", "=weight-decay:0", "--param-group", "mean=lr-factor:1",
    )  # fmt: skip
    assert "write it as REGEX=lr-factor" in command.fail("check", MODEL, *groups)
    out = command.succeed(
        "check", MODEL,
        "--param-group", "bias$=weight-decay:0",
        "--param-group", r"^head\.linear\.bias$=lr-factor:10,weight-decay:0.1",
    )  # fmt: skip
    lines = [line for line in out.splitlines() if line.startswith("group ")]
    assert lines[0].startswith("group bias$ (weight decay 0): ")
    assert "head.linear.bias" not in lines[0]
    assert lines[1:] == [
        r"group ^head\.linear\.bias$ (learning rate x 10, weight decay 0.1): 1 parameter, "
        "head.linear.bias"
    ]
    assert "finds no parameter" in command.fail("check", MODEL, "--param-group", "tail=lr-factor:2")


def test_the_command_takes_several_losses_with_their_settings(
    command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "heads.onnx"
    onnx.save(build_two_heads(), path)
    out = command.succeed(
        "check", path, "--loss", "mse,output=a,labels=one", "--loss", "cross-entropy,output=b"
    )
    assert "losses that fit outputs 'a', 'b': mse, cross-entropy\n" in out
    assert "single-tensor cuts: 2" in out
    assert "--label-smoothing is for cross-entropy" in command.fail(
        "check", path, "--loss", "mse", "--label-smoothing", "0.1"
    )
