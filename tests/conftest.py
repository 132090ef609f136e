"""Fixtures that several test modules share: the built wheel, and environments it is put into."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

from tests.support.event_loops import use

ROOT = Path(__file__).parent.parent
os.environ.setdefault("SPLITONNX_NO_CHECK", "1")
"""Thousands of models are cut here, and their tests compare more; tests of the comparison ask for
it."""
hypothesis.settings.register_profile("without a stopwatch", deadline=None)
hypothesis.settings.load_profile("without a stopwatch")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "splitonnx", "partitioner", "runtime")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    printed: str = done.stdout
    return printed


def make_environment(folder: Path, *requirements: str) -> Path:
    """Make a fresh virtual environment, install ``requirements``, and return its python.

    This environment's pip installs them.  What is never imported there is not compiled.
    """
    venv.create(folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-compile", *requirements, cwd=ROOT)
    return python


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], Path]) -> Path:
    """Return what ``build`` makes in a fresh folder; pytest's processes make it once together.

    The one that asks first makes it, while the others wait.
    """
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    made, note = shared / name, shared / f"{name}.made"
    with FileLock(shared / f"{name}.lock"):
        if not note.exists():
            shutil.rmtree(made, ignore_errors=True)  # of one that failed
            made.mkdir()
            note.write_text(str(build(made)))
        return Path(note.read_text())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that none of them runs last, with a core to spare."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Exempt what is loaded from garbage collections, since it lives until the end anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """Turn the garbage collector on again: a command turns it off for the rest of its process."""
    yield
    gc.enable()


@pytest.fixture
def event_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The event loop that servers of this process run on; see :mod:`tests.support.event_loops`."""
    loop: str = request.param
    use(loop, monkeypatch)
    return loop


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, which is built from a clean copy of the sources."""
    return build_once(tmp_path_factory, "shared-wheel", build_wheel)


def build_wheel(folder: Path) -> Path:
    """Build the wheel in a folder."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "node_modules")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, folder / name)
    run(sys.executable, "-m", "build", "--outdir", "dist", cwd=folder)
    (built,) = folder.glob("dist/*.whl")
    return built


@pytest.fixture(scope="session")
def portable_python(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The python of an environment as a device has it: splitonnx[portable], and no onnx.

    SPLITONNX_PORTABLE_PYTHON names one that stands already.
    """
    return find_python("portable", request, tmp_path_factory)


def find_python(
    extra: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the python of an environment with an extra, as a variable names it, or build one."""
    given = os.environ.get(f"SPLITONNX_{extra.upper()}_PYTHON")
    if given:
        return Path(given)
    wheel: Path = request.getfixturevalue("wheel")
    return build_once(
        tmp_path_factory,
        f"shared-{extra}",
        lambda folder: make_environment(folder / "venv", f"{wheel}[{extra}]"),
    )
