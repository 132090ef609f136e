"""What the base install does not bring, and which extra would."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitonnx import extras
from splitonnx.errors import MissingExtra


def test_a_module_that_no_extra_brings_is_python_s_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wants_onnx.py").write_text("raise ModuleNotFoundError(name='onnx.helper')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra, match=r"splitonnx\[cpu\]"):
        extras.load("wants_onnx", "this")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        extras.load("no_such_module", "this")


def test_what_is_installed_is_imported() -> None:
    assert extras.load("onnx.helper", "cut").__name__ == "onnx.helper"


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("onnx", "cpu"),
        ("onnx_ir", "cpu"),
        ("onnxruntime", "portable"),
        ("tensorboardX", "tensorboard"),
    ],
)
def test_the_smallest_extra_that_brings_a_package_is_named_with_what_wants_it(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: str) -> None:
        raise ModuleNotFoundError(name=f"{package}.inner")

    monkeypatch.setattr(extras, "import_module", fail)
    with pytest.raises(MissingExtra) as caught:
        extras.load("splitonnx.something", "inspect")
    assert (caught.value.module, caught.value.extra, caught.value.purpose) == (
        package,
        extra,
        "inspect",
    )
