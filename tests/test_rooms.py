"""The rooms: where modules and their tests stand, how long files are, and which packages there are.

Its figures are printed; `pytest -s tests/test_rooms.py` shows them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

MOST_LINES = 400
MOST_MODULES = 12
MOST_PACKAGES = 20
"""Named in the two contracts between rooms."""

HOMES = {"runtime": "tests/runtime", "partitioner": "tests/partitioner", "splitonnx": "tests"}
"""Where the tests of a folder's modules stand, at the same path."""
TABLES = frozenset({"partitioner/rewrites"})
"""Flat tables of operators, which have as many modules as there are families of those."""

LONG: tuple[str, ...] = ()
"""Files that are longer, until they are split."""


def list_files(folder: str, ending: str) -> Iterator[Path]:
    """List the sources within a folder, without what was installed or written beside them."""
    for path in sorted((ROOT / folder).rglob(f"*{ending}")):
        parts = path.relative_to(ROOT).parts
        if not {"node_modules", "__pycache__", "dist"} & set(parts):
            yield path


def list_logic() -> Iterator[tuple[str, Path]]:
    """List each module, and where its own tests should stand."""
    for folder, tests in HOMES.items():
        for path in list_files(folder, ".py"):
            module = path.relative_to(ROOT / folder)
            if not module.name.startswith("__") and module.parts[0] not in ("js", *HOMES):
                place = ROOT / tests / module.with_name(f"test_{module.name}")
                yield f"{folder}/{module.as_posix()}", place


def test_each_module_has_its_own_test_file_at_the_mirrored_path() -> None:
    modules = dict(list_logic())
    missing = {name for name, place in modules.items() if not place.is_file()}
    print(f"{len(modules)} modules, {len(modules) - len(missing)} with a test file of their own")
    assert len(modules) > 100
    assert not missing


@pytest.mark.parametrize(
    ("folder", "ending"),
    [
        ("splitonnx", ".py"),
        ("runtime", ".py"),
        ("partitioner", ".py"),
        ("tests", ".py"),
        ("runtime/js/src", ".ts"),
        ("runtime/js/tests", ".ts"),
    ],
)
def test_no_source_file_is_too_long(folder: str, ending: str) -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in list_files(folder, ending)
    }
    assert lengths
    longest = max(lengths, key=lengths.__getitem__)
    print(f"{folder}: {len(lengths)} files, the longest is {longest}, {lengths[longest]} lines")
    assert {name for name, lines in lengths.items() if lines > MOST_LINES} <= set(LONG)


@pytest.mark.parametrize("root", ["runtime", "partitioner"])
def test_no_room_has_too_many_modules(root: str) -> None:
    rooms: dict[str, int] = {}
    for path in list_files(root, ".py"):
        room = path.parent.relative_to(ROOT).as_posix()
        rooms[room] = rooms.get(room, 0) + (not path.name.startswith("__"))
    print(", ".join(f"{room}: {count}" for room, count in rooms.items()))
    assert len(rooms) > 5
    assert {r for r, count in rooms.items() if count > MOST_MODULES} <= TABLES


def test_the_contracts_between_rooms_name_few_packages() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    named = {
        f"{container.removeprefix('splitonnx.')}/{name.strip()}"
        for contract in contracts
        for container in contract.get("containers", ())
        for layer in contract["layers"]
        for name in layer.split("|")
    }
    packages = {name for name in named if (ROOT / name).is_dir()}
    modules = {name for name in named if (ROOT / f"{name}.py").is_file()}
    print(f"{len(packages)} packages and {len(modules)} modules in the contracts between rooms")
    assert named == packages | modules
    assert 0 < len(packages) <= MOST_PACKAGES


def test_the_contracts_between_rooms_name_every_room() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    held = {name: c for c in contracts for name in c.get("containers", ())}
    assert held.keys() == {"splitonnx.runtime", "splitonnx.partitioner"}
    assert all(contract["exhaustive"] for contract in held.values())


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


def test_the_package_table_names_every_folder() -> None:
    packages = {str(Path(name).parent).replace("/", ".") for name in list_modules(ROOT)}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages
