"""Arrays from numpy's files: whole, mapped, or by their headers alone."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from splitonnx.errors import UnusableData
from splitonnx.runtime.client.array_files import (
    list_batch_files,
    map_folder,
    read_declared,
    read_npz,
)
from splitonnx.tensors import TensorSpec

X = TensorSpec(name="x", dtype="F32", shape=("N", 3))
LABELS = TensorSpec(name="labels", dtype="I64", shape=("N",), bounds=(0, 10))


def test_batch_files_are_listed_by_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "10", "9"):
        np.savez(tmp_path / f"{name}.npz", x=np.zeros(1))
    (tmp_path / "README.txt").write_text("of other kinds")
    found = [file.name for file in list_batch_files(tmp_path)]
    assert found == ["10.npz", "9.npz", "a.npz", "b.npz"]
    assert list_batch_files(tmp_path / "a.npz") == []
    assert list_batch_files(tmp_path / "absent") == []


def test_a_folder_of_both_kinds_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(1))
    np.save(tmp_path / "x.npy", np.zeros(1))
    with pytest.raises(UnusableData, match=r"it holds \.npz and \.npy files"):
        list_batch_files(tmp_path)


def test_only_arrays_with_bounds_are_read_for_a_check(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.ones((1000, 3), np.float32), labels=np.arange(9), note=np.array("text"))
    found = read_declared(path, [X, LABELS])
    assert (found["x"].shape, found["x"].dtype) == ((1000, 3), np.dtype("f4"))
    assert found["x"].strides == (0, 0)
    np.testing.assert_array_equal(found["labels"], np.arange(9))
    assert found["note"].dtype.kind == "U"


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_headers_of_both_versions_and_orders_are_understood(
    tmp_path: Path, version: tuple[int, int]
) -> None:
    written = io.BytesIO()
    np.lib.format.write_array(written, np.asfortranarray(np.ones((2, 3))), version)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", written.getvalue())
    assert read_declared(tmp_path / "a.npz", [X])["x"].shape == (2, 3)


def test_a_file_with_something_else_in_it_is_refused_either_way(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for name, content in (("note.txt", b"no array"), ("x.npy", b"no array either")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(UnusableData, match="cannot be read as arrays"):
            read_npz(path)
        with pytest.raises(UnusableData, match="cannot be read as arrays"):
            read_declared(path, [X])


def test_python_objects_are_refused_by_their_header(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{}, []], dtype=object))
    with pytest.raises(UnusableData, match="'x' in it contains Python objects"):
        read_declared(tmp_path / "a.npz", [X])


def test_a_folder_of_arrays_is_mapped_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    assert isinstance(map_folder(tmp_path)["x"], np.memmap)


def test_a_file_of_text_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    for name, read in (("x.npz", read_npz), ("x.npy", lambda path: map_folder(path.parent))):
        (tmp_path / name).write_text("some text")
        told = rf"a \.{name[2:]} .*was expected, but it begins with b'some tex'; use np\.save"
        with pytest.raises(UnusableData, match=told):
            read(tmp_path / name)
