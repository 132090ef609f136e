"""merge and export, run as a user runs them."""

from __future__ import annotations

from pathlib import Path

from splitonnx.bundles import Bundle
from splitonnx.partitioner.adaptations import adapt
from splitonnx.partitioner.merges import merge, write_adapters
from splitonnx.partitioner.partitions import cut
from tests.support.commands import MODEL, Command
from tests.support.parted import make_parted
from tests.support.zoo import ZOO


def test_a_model_in_place_of_a_bundle_is_told_apart(command: Command, tmp_path: Path) -> None:
    reason = command.fail("merge", MODEL, "-o", tmp_path / "merged.onnx")
    assert "it is a file, but a bundle is a folder" in reason
    assert "splitonnx cut" in reason


def test_a_value_that_is_not_a_choice_is_told_plainly(command: Command, tmp_path: Path) -> None:
    reason = command.fail("export", tmp_path, "--for", "desktop")
    assert "Invalid value for '--for': 'desktop' is not one of 'mobile'" in reason


def test_options_for_a_server_take_one(command: Command, tmp_path: Path) -> None:
    words = ("merge", tmp_path, "-o", tmp_path / "merged.onnx")
    (tmp_path / "token").write_text("x" * 43)
    reason = command.fail(*words, "--session", "0a")
    assert "--session: for a server, and none is named; name it with --from" in reason
    reason = command.fail(*words, "--token-file", tmp_path / "token")
    assert "--token-file: for a server, and none is named" in reason


def test_an_output_that_exists_is_told_before_a_server_is_asked(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "merged.onnx").touch()
    words = ("merge", tmp_path, "-o", tmp_path / "merged.onnx", "--from", "ws://127.0.0.1:1")
    assert "overwrite it with --force" in command.fail(*words)


def test_adapters_alone_are_written_of_a_part_that_was_fetched(
    command: Command, tmp_path: Path
) -> None:
    adapted = adapt(ZOO["chain"].build(), lora=["w[13]"], rank=1)
    parted = make_parted(tmp_path, cut(adapted, at="act1", loss=ZOO["chain"].loss))
    (tmp_path / "token").write_text(parted.tokens["fetch"])
    (tmp_path / "token").chmod(0o600)
    with parted.serve() as server:
        parted.train(server.url)
        words = ("--from", server.url, "--token-file", tmp_path / "token", "--quiet")
        place = tmp_path / "adapters.safetensors"
        command.succeed("merge", parted.bundle, "--adapters", "-o", place, *words)
        folded = tmp_path / "folded.onnx"
        command.succeed("merge", parted.bundle, "--fold", "-o", folded, *words)
    parted.merge_side_by_side(tmp_path / "whole")
    whole = Bundle.load(tmp_path / "whole")
    write_adapters(whole, tmp_path / "expected.safetensors")
    assert place.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert folded.read_bytes() == merge(whole, fold=True)
