"""Size: weights are mapped and streamed, so that a model's weight costs no memory to cut."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from splitonnx import Bundle, cut, merge, write_merged
from splitonnx.chunks import PIECE, iter_chunks
from splitonnx.errors import UnwritableFile, UsageError
from splitonnx.partitioner import model_files
from tests.support.zoo import FLOAT, ZOO


def write_model(folder: Path, width: int) -> Path:
    """A perceptron of two layers of ``width``, whose weights are a sparse file of zeros."""
    weights = []
    for index in range(2):
        tensor = TensorProto(name=f"w{index}", data_type=FLOAT, dims=[width, width])
        tensor.data_location = TensorProto.EXTERNAL
        size = 4 * width * width
        for key, value in (("location", "weights"), ("offset", index * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "w1"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, FLOAT, ["N", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "large", ports[:1], ports[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with (folder / "weights").open("wb") as file:
        file.truncate(8 * width * width)
    return folder / "model.onnx"


def measure(*arguments: str | Path) -> int:
    """Run a command of splitonnx; return the peak of its resident memory in bytes."""
    command = [sys.executable, "-m", "splitonnx", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.skipif(os.name == "nt", reason="peaks of memory are measured with wait4")
def test_cutting_takes_no_more_memory_for_large_weights(tmp_path: Path) -> None:
    size = 8 * 5000**2  # 200 MB
    peaks = {}
    for width in (8, 5000):
        model = write_model(tmp_path / str(width), width)
        bundle = tmp_path / f"bundle{width}"
        peaks[width] = measure(
            "cut", model, "--at", "hidden", "--send-labels", "--loss", "mse", "-o", bundle
        )
    assert peaks[5000] - peaks[8] < size / 4
    for party, name in (("client", "w0"), ("server", "w1")):
        weight = Bundle.load(bundle).parties[party].weights[name]
        assert weight.shape == (5000, 5000)
        assert not weight[::999].any()


def test_pieces_are_the_whole_and_mapped_pages_are_read_again(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(2 * PIECE + 12)
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(mapping, np.float32, offset=8)
    for _ in range(2):
        assert b"".join(iter_chunks(array)) == content[8:]
        assert b"".join(iter_chunks(array.data)) == content[8:]


def test_pages_that_were_written_to_are_not_given_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    array = np.memmap(tmp_path / "file", np.uint8, "c")
    array[:] = 7
    assert list(iter_chunks(array)) == [bytes([7]) * 4096]
    assert (array == 7).all()


def test_a_merged_model_too_large_for_one_file_is_written_as_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = cut(ZOO["batchnorm_trained"].build(), at="r1", send_labels=True)
    whole = merge(bundle)
    monkeypatch.setattr(model_files, "MAX_INSIDE", 64)
    with pytest.raises(UsageError, match="write_merged"):
        merge(bundle)
    path = tmp_path / "trained.onnx"
    written = write_merged(bundle, path)
    files = [path, tmp_path / "trained.onnx.data"]
    assert sorted(tmp_path.iterdir()) == files
    assert written == sum(file.stat().st_size for file in files)
    onnx.checker.check_model(path)
    data = {"x": ZOO["batchnorm_trained"].data(4)["x"]}
    inside, outside = (onnxruntime.InferenceSession(m).run(None, data) for m in (whole, str(path)))
    np.testing.assert_array_equal(inside[0], outside[0])


def test_a_merged_model_overwrites_nothing_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = cut(ZOO["chain"].build(), at="act1", send_labels=True)
    monkeypatch.setattr(model_files, "MAX_INSIDE", 64)
    beside = tmp_path / "trained.onnx.data"
    beside.write_bytes(b"mine")
    with pytest.raises(UnwritableFile, match="exists already"):
        write_merged(bundle, tmp_path / "trained.onnx")
    assert [file.name for file in tmp_path.iterdir()] == [beside.name]
    write_merged(bundle, tmp_path / "trained.onnx", overwrite=True)
    assert beside.read_bytes() != b"mine"
