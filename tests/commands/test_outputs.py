"""merge and export, run as a user runs them."""

from __future__ import annotations

from pathlib import Path

from tests.support.commands import MODEL, Command


def test_a_model_in_place_of_a_bundle_is_told_apart(command: Command, tmp_path: Path) -> None:
    reason = command.fail("merge", MODEL, "-o", tmp_path / "merged.onnx")
    assert "it is a file, but a bundle is a folder" in reason
    assert "splitonnx cut" in reason


def test_a_value_that_is_not_a_choice_is_told_plainly(command: Command, tmp_path: Path) -> None:
    reason = command.fail("export", tmp_path, "--for", "desktop")
    assert "Invalid value for '--for': 'desktop' is not one of 'mobile'" in reason
