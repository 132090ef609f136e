"""What is delivered beside the code: lock files, the container's file, the unit of systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.support.container_steps import FILE, read_recipe

LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
UNIT = ROOT / "packaging" / "splitonnx.service"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "lock.py", "--check"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def read_pins(path: Path) -> dict[str, list[str]]:
    """Read a lock file: the versions by package."""
    pins: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([a-z0-9.-]+)==([^\s;]+)", path.read_text(), re.MULTILINE):
        pins.setdefault(name, []).append(version)
    return pins


def test_the_lock_files_are_of_this_pyproject() -> None:
    done = check(ROOT / "requirements")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_lock_file_of_another_pyproject_is_told(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace('"numpy>=1.26"', '"numpy>=2.0"'))
    done = check(tmp_path / "requirements")
    assert done.returncode == 1
    assert "requirements/dev.txt" in done.stderr
    assert "make lock" in done.stderr


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_locked_package_has_hashes_and_no_address(path: Path) -> None:
    text = path.read_text()
    blocks = re.split(r"^(?=[a-z0-9])", text.partition("\n")[2], flags=re.MULTILINE)
    blocks = [block for block in blocks if "==" in block]
    assert len(blocks) == sum(map(len, read_pins(path).values())) > 0
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
    assert not re.search(r"https?://|--(extra-)?index", text)


def test_the_lock_holds_what_pyproject_names() -> None:
    pins = read_pins(ROOT / "requirements" / "dev.txt")
    named = [
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["cpu"],
        *PROJECT["dependency-groups"]["dev"],
        *PROJECT["build-system"]["requires"],
    ]
    for requirement in map(Requirement, named):
        versions = pins[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_the_container_runs_as_nobody_s_user_with_tokens() -> None:
    recipe = read_recipe(FILE.read_text(), {})
    user, group = map(int, recipe.user.split(":"))
    assert user > 1000
    assert group > 1000
    assert recipe.runs == ["sh packaging/install.sh training /opt/splitonnx"]
    assert "--token-file" in recipe.command
    for names, _ in recipe.copies:
        assert all((ROOT / name).exists() for name in names)
    other = read_recipe(FILE.read_text(), {"RUNTIME": "portable"})
    assert other.runs == ["sh packaging/install.sh portable /opt/splitonnx"]


def test_the_installing_script_takes_no_other_runtime(tmp_path: Path) -> None:
    command = ["sh", "packaging/install.sh", "cuda; rm", str(tmp_path / "venv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'training' or 'portable'" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/opt/splitonnx/bin/splitonnx", shutil.which("true") or "")
    (tmp_path / UNIT.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / UNIT.name],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    own = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, own) == (0, [])


def test_the_unit_restarts_limits_and_hardens() -> None:
    lines = set(UNIT.read_text().splitlines())
    for line in (
        "Restart=on-failure", "MemoryMax=75%", "TasksMax=512", "LimitNOFILE=4096",
        "DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes", "CapabilityBoundingSet=",
    ):  # fmt: skip
        assert line in lines
