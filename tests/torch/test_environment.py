"""PyTorch is imported on first use, and its absence or age is an error of the environment."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import splitonnx
from splitonnx.errors import TorchNeeded
from splitonnx.torch.environment import NEEDED, import_torch, read_version
from tests.conftest import ROOT, run


def test_versions_are_compared_by_their_numbers() -> None:
    assert read_version("2.13.0+cpu") == (2, 13)
    assert read_version("2.5.0a0") == (2, 5)
    assert read_version("1.9") < read_version("1.10")


def test_without_pytorch_the_error_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(TorchNeeded) as caught:
        import_torch("splitonnx.torch.load")
    assert str(caught.value) == (
        "splitonnx.torch.load needs torch >=2.5, but it is not installed; splitonnx does not "
        "install it: run pip install 'torch>=2.5' in the environment of the network"
    )


def test_a_pytorch_that_is_too_old_is_refused_with_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = ModuleType("torch")
    old.__version__ = "2.4.1+cpu"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", old)
    with pytest.raises(TorchNeeded, match=r"2\.4\.1\+cpu is installed") as caught:
        import_torch("splitonnx.torch.export")
    assert caught.value.needed == NEEDED


def test_neither_splitonnx_nor_its_room_imports_pytorch() -> None:
    script = (
        "import sys, splitonnx, splitonnx.torch; splitonnx.torch.export; splitonnx.torch.load; "
        "print('torch' in sys.modules)"
    )
    assert run(sys.executable, "-c", script, cwd=ROOT) == "False\n"


def test_the_room_is_an_attribute_and_does_not_hide_pytorch() -> None:
    assert splitonnx.torch.__name__ == "splitonnx.torch"
    assert {"export", "load"} <= set(dir(splitonnx.torch))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        splitonnx.torch.__getattr__("nonsense")
    script = "import splitonnx.torch, importlib.util as u; print(u.find_spec('torch'))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "splitonnx" not in done.stdout
