"""What is installed: the built wheel in a fresh environment, and what its imports bring in."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import splitonnx
from tests.conftest import ROOT, make_environment, run

ENOUGH_EPOCHS = "5"
"""With them the demo reaches the accuracy that it promises, too."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def list_modules(base: Path) -> set[str]:
    """List the Python files of the three folders as they should be installed."""
    homes = {"splitonnx": "splitonnx", "partitioner": "splitonnx/partitioner"}
    homes["runtime"] = "splitonnx/runtime"
    return {
        f"{home}/{path.relative_to(base / folder).as_posix()}"
        for folder, home in homes.items()
        for path in (base / folder).rglob("*.py")
        if not (folder == "splitonnx" and path.relative_to(base).parts[1] in homes)
    }


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name for name in names if name.endswith(".py")} == list_modules(ROOT)
    assert {name.split("/")[0] for name in names} == {"splitonnx"}
    assert "splitonnx/py.typed" in names


@pytest.mark.long
def test_the_demo_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv", f"{wheel}[cpu]", "scikit-learn")
    listing = run(
        python,
        "-c",
        "import sysconfig, os; print(*os.listdir(sysconfig.get_path('purelib')), sep='\\n')",
        cwd=tmp_path,
    ).split()
    assert "splitonnx" in listing
    assert not {"partitioner", "runtime", "commands", "tests", "examples"} & set(listing)
    for name in ("demo.py", "digits.onnx"):
        shutil.copy(ROOT / "examples" / name, tmp_path / name)
    printed = run(python, "demo.py", "demo-output", ENOUGH_EPOCHS, cwd=tmp_path)
    assert "good: " in printed
    assert (tmp_path / "demo-output" / "trained.onnx").is_file()


def test_importing_splitonnx_is_light() -> None:
    heavy = "{'onnx', 'onnx_ir', 'onnxruntime', 'websockets', 'numpy', 'typer', 'rich'}"
    script = f"import sys, splitonnx; print(sorted({heavy} & sys.modules.keys()))"
    assert run(sys.executable, "-c", script, cwd=ROOT) == "[]\n"


def test_every_public_name_is_found() -> None:
    for name in splitonnx.__all__:
        assert getattr(splitonnx, name).__name__ == name
        assert name in dir(splitonnx)
    assert splitonnx._HOMES.keys() == set(splitonnx.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        splitonnx.__getattr__("nonsense")


def test_without_onnx_the_client_works_and_cut_names_its_extra(
    portable_python: Path, tmp_path: Path
) -> None:
    run(portable_python, "-c", "from splitonnx import Bundle, Client, Server", cwd=tmp_path)
    done = subprocess.run(
        [portable_python, "-m", "splitonnx", "inspect", "model.onnx"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("splitonnx: inspect needs 'onnx")
    assert done.stderr.endswith("run: pip install 'splitonnx[cpu]'\n")
