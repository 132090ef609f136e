"""Imports that a command puts off: they cost nothing, and are there when they are used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from splitonnx.commands.imports import postpone
from tests.conftest import ROOT, run
from tests.support.commands import AT, MODEL


def test_a_postponed_module_is_imported_at_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "colorsys", None)  # restored at the end
    del sys.modules["colorsys"]
    postpone("colorsys")
    import colorsys

    standing_in = sys.modules["colorsys"]
    assert colorsys.rgb_to_hls(0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)
    assert standing_in is not sys.modules["colorsys"]
    assert colorsys.rgb_to_hls is sys.modules["colorsys"].rgb_to_hls


def test_a_module_that_is_there_already_stays() -> None:
    postpone("pytest")
    assert sys.modules["pytest"] is pytest


def test_a_module_that_is_missing_fails_at_its_first_use() -> None:
    postpone("no_such_module")
    import no_such_module  # type: ignore[import-not-found]

    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        no_such_module.anything  # noqa: B018
    assert "no_such_module" not in sys.modules


USING = """
import contextlib, sys
from splitonnx.commands import main
sys.argv = ["splitonnx", "cut", {model!r}, "--at", {at!r}, "-o", {folder!r}]
with contextlib.suppress(SystemExit):
    main()
print("sympy.core" in sys.modules)
import onnx_ir
print(onnx_ir.SymbolicDim("N") + 1, "sympy.core" in sys.modules)
"""


def test_a_command_leaves_out_what_it_does_not_use(tmp_path: Path) -> None:
    script = USING.format(model=str(MODEL), at=AT, folder=f"{tmp_path}/bundle")
    printed = run(sys.executable, "-c", script, cwd=ROOT).splitlines()
    assert printed[-2:] == ["False", "N + 1 True"]
