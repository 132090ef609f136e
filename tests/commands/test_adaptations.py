"""adapt, and what merge does with adapters, run as a user runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from splitonnx.partitioner.adapter_files import read_adapters
from tests.support.commands import AT, MODEL, Command


def test_adapters_are_added_trained_saved_and_folded(
    command: Command, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted, trained = tmp_path / "adapted.onnx", tmp_path / "trained.onnx"
    told = command.succeed("adapt", MODEL, "--lora", "Gemm", "--rank", 4, "-o", adapted)
    assert " adapters with " in told or " adapter with " in told
    assert "and only these are trained" in command.succeed("check", adapted)
    assert "exists already" in command.fail("adapt", MODEL, "--lora", "Gemm", "-o", adapted)
    line = ("train", adapted, "--local", "--data", data, "-o", trained)
    command.succeed(*line)
    command.succeed("merge", trained, "--adapters", "-o", tmp_path / "incomplete")
    assert "'block1.norm1.running_mean'" in caplog.text
    assert "changed in training as well" in caplog.text
    command.succeed(*line, "--force", "--batchnorm", "frozen")
    saved, folded = tmp_path / "adapters.safetensors", tmp_path / "folded.onnx"
    command.succeed("merge", trained, "--adapters", "-o", saved)
    command.succeed("merge", trained, "--fold", "-o", folded)
    assert any(second.any() for _, second in read_adapters(saved).matrices.values())
    again, twice = tmp_path / "again.onnx", tmp_path / "twice.onnx"
    command.succeed("adapt", MODEL, "--adapters", saved, "-o", again)
    command.succeed("merge", again, "--fold", "-o", twice)
    one, two = (onnx.load(path).graph.initializer for path in (folded, twice))
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in one}
    assert not [name for name in weights if "lora" in name]
    for tensor in two:
        if tensor.name in weights:
            np.testing.assert_array_equal(
                onnx.numpy_helper.to_array(tensor), weights[tensor.name], tensor.name
            )


def test_a_bundle_with_adapters_is_merged_and_saved_alone(command: Command, tmp_path: Path) -> None:
    adapted, bundle = tmp_path / "adapted.onnx", tmp_path / "bundle"
    command.succeed("adapt", MODEL, "--lora", "Gemm", "-o", adapted, "--quiet")
    command.succeed("cut", adapted, "--at", AT, "--send-labels", "-o", bundle, "--no-check")
    command.succeed("merge", bundle, "--adapters", "-o", tmp_path / "a.safetensors")
    command.succeed("merge", bundle, "--fold", "-o", tmp_path / "folded.onnx")
    assert "exclude each other" in command.fail(
        "merge", bundle, "--fold", "--adapters", "-o", tmp_path / "x"
    )


def test_wrong_options_are_told_in_a_line(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "adapted.onnx"
    assert "--lora REGEX" in command.fail("adapt", MODEL, "-o", out)
    assert "no parameter's name fits" in command.fail("adapt", MODEL, "--lora", "qq", "-o", out)
    assert "no adapters to fold" in command.fail("merge", MODEL, "--fold", "-o", out)
    assert not out.exists()
