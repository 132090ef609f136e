"""Imports that are put off or left out, and are there for whoever uses them."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path

import pytest

from splitonnx.imports import leaving_out, postpone, postponing
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


def test_a_module_that_is_missing_fails_when_it_is_imported() -> None:
    postpone("no_such_module", "no_such_package.module")
    for name in ("no_such_module", "no_such_package.module"):
        assert name not in sys.modules
        with pytest.raises(ModuleNotFoundError):
            import_module(name)


def test_who_looks_at_all_modules_does_not_import_a_postponed_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)  # it would print
    postpone("this")
    standing_in = sys.modules["this"]
    assert not hasattr(standing_in, "__file__")
    assert inspect.getmodule(postpone) is sys.modules["splitonnx.imports"]
    assert sys.modules.pop("this") is standing_in


USING = """
import contextlib, sys
from splitonnx.commands import main
sys.argv = ["splitonnx", "cut", {model!r}, "--at", {at!r}, "--send-labels", "-o", {folder!r}]
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


LIBRARY = """
import sys, splitonnx
splitonnx.cut({model!r}, at={at!r}, send_labels=True)
print("sympy" in sys.modules)
import sympy, onnx_ir
print(sympy is sys.modules["sympy"], sympy.__name__, type(sympy).__name__)
print(onnx_ir.SymbolicDim("N") + 1)
"""


def test_a_cut_from_python_imports_no_sympy_and_leaves_it_to_others_as_it_is() -> None:
    printed = run(sys.executable, "-c", LIBRARY.format(model=str(MODEL), at=AT), cwd=ROOT)
    assert printed.splitlines() == ["False", "True sympy module", "N + 1"]


def test_what_was_postponed_in_a_block_can_be_imported_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "colorsys", None)  # restored at the end
    del sys.modules["colorsys"]
    with postponing("colorsys", "no_such_module"):
        standing_in = import_module("colorsys")
    assert "colorsys" not in sys.modules
    real = import_module("colorsys")
    assert standing_in is not real
    assert standing_in.rgb_to_hls is real.rgb_to_hls
    with postponing("colorsys"):
        assert import_module("colorsys") is real
    assert sys.modules["colorsys"] is real


def test_what_is_left_out_is_refused_to_its_package_and_to_nobody_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "two_parts"
    package.mkdir()
    (package / "costly.py").touch()
    (package / "__init__.py").write_text(
        "try:\n    from two_parts import costly\nexcept ImportError:\n    costly = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with leaving_out("two_parts.costly"):
        two_parts = import_module("two_parts")
    assert two_parts.costly is None
    costly = import_module("two_parts.costly")
    with leaving_out("two_parts.costly"):
        assert sys.modules["two_parts.costly"] is costly


def test_nothing_is_refused_where_the_package_is_loaded_already() -> None:
    with leaving_out("json.no_such_module"):
        assert "json.no_such_module" not in sys.modules


@pytest.mark.parametrize(
    ("module", "load"),
    [
        ("splitonnx.runtime.engine.builds.installed", "import_onnxruntime"),
        ("splitonnx.partitioner.native.natives", "import_onnxruntime"),
    ],
)
def test_onnx_runtime_is_loaded_without_its_code_for_training(module: str, load: str) -> None:
    script = (
        f"import sys, {module} as module; print(module.{load}().InferenceSession, "
        "'onnxruntime.training' in sys.modules)"
    )
    assert run(sys.executable, "-c", script, cwd=ROOT).endswith("InferenceSession'> False\n")
