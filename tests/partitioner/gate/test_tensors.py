"""Tensors: sizes that agree with the bytes, and data outside the model only beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import ModelProto, TensorProto

from splitonnx.errors import ForbiddenExternalData, ModelError, NotAModel
from splitonnx.partitioner.gate.gates import open_model
from tests.partitioner.gate.broken_models import Breakage, hold_refusal, make_model


def claim_terabytes(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.dims[:] = [2**20, 2**20]


def claim_typed_terabytes(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.dims[:] = [2**20, 2**20]


def half_a_weight(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0, 2.0])


def negative_shape(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -1


def unknown_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = 999


BROKEN: list[Breakage] = [
    (claim_terabytes, NotAModel, "declares 4398046511104 bytes"),
    (claim_typed_terabytes, NotAModel, "declares 4398046511104 bytes"),
    (half_a_weight, NotAModel, "'w0'"),
    (negative_shape, NotAModel, "shape"),
    (unknown_type, NotAModel, "no known data type"),
]


@pytest.mark.parametrize(
    ("break_it", "kind", "reason"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_model_is_refused_in_one_line(
    break_it: Callable[[ModelProto], None], kind: type[ModelError], reason: str
) -> None:
    hold_refusal(break_it, kind, reason)


def externalise(model: ModelProto, **entries: str) -> ModelProto:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"location": "absent.bin"}, "is missing"),
        ({"location": "weights.bin", "offset": "4000"}, "declares 192 bytes"),
        ({"location": "weights.bin", "offset": "-8"}, "declares 192 bytes"),
        (
            {"location": "weights.bin", "length": "8"},
            "declares 192 bytes, but the length of its place in 'weights.bin' is 8",
        ),
        ({"location": "weights.bin", "offset": "many"}, "no valid place"),
        ({"location": ""}, "outside"),
    ],
)
def test_external_data_that_is_not_there_is_refused(
    entries: dict[str, str], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(4096))
    path = tmp_path / "model.onnx"
    path.write_bytes(externalise(make_model(), **entries).SerializeToString())
    with pytest.raises(ModelError, match=reason):
        open_model(path)


def test_a_link_out_of_the_folder_is_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    folder = tmp_path / "model"
    folder.mkdir()
    os.symlink(tmp_path / "secret.bin", folder / "weights.bin")
    path = folder / "model.onnx"
    path.write_bytes(externalise(make_model(), location="weights.bin").SerializeToString())
    with pytest.raises(ForbiddenExternalData):
        open_model(path)


def test_a_model_in_memory_may_read_no_file() -> None:
    model = externalise(make_model(), location="weights.bin")
    for source in (model, model.SerializeToString()):
        with pytest.raises(ForbiddenExternalData):
            open_model(source)
