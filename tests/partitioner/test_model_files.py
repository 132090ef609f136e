"""A model in one file, or in two where its weights are too large for one."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from splitonnx.errors import UnwritableFile, UsageError
from splitonnx.partitioner import model_files
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.model_files import serialize_model, write_model
from tests.support.zoo import ZOO


def test_a_model_is_written_as_its_bytes(tmp_path: Path) -> None:
    content = serialize_model(open_model(ZOO["chain"].build()), "it", "that")
    size = write_model(open_model(content), tmp_path / "new" / "model.onnx", overwrite=False)
    assert (tmp_path / "new" / "model.onnx").read_bytes() == content
    assert size == len(content)


def test_weights_too_large_for_one_file_are_written_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "given.onnx"
    onnx.save(
        ZOO["chain"].build(), source, save_as_external_data=True, location="given.bin",
        size_threshold=0,
    )  # fmt: skip
    monkeypatch.setattr(model_files, "MAX_INSIDE", 64)
    with pytest.raises(UsageError, match=r"the model's weights take 0\.00 GB.*write it with that"):
        serialize_model(open_model(source), "the model", "that")
    target = tmp_path / "model.onnx"
    size = write_model(open_model(source), target, overwrite=False)
    beside = tmp_path / "model.onnx.data"
    assert size == target.stat().st_size + beside.stat().st_size
    for name in ("given.onnx", "given.bin"):
        (tmp_path / name).unlink()
    before = {t.name: onnx.numpy_helper.to_array(t) for t in ZOO["chain"].build().graph.initializer}
    for tensor in onnx.load(target).graph.initializer:
        assert (onnx.numpy_helper.to_array(tensor) == before[tensor.name]).all()
    with pytest.raises(UnwritableFile, match="exists already"):
        write_model(open_model(target), tmp_path / "model.onnx", overwrite=False)
