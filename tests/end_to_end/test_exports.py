"""Models as real exporters write them are cut and trained as they are; see exports/README.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from splitonnx.names import TRAIN
from splitonnx.partitioner.merges import merge
from tests.conftest import build_once
from tests.support import trials
from tests.support.recordings import RecordingTransport, check_explained, record_connections
from tests.support.trials import TARGETS, KeptSubject, compare, train, train_stock, try_places

FOLDER = Path(__file__).parents[1] / "exports"
EXPORTS = sorted(path.stem for path in FOLDER.glob("*.onnx"))
TRAINING = [n for n in EXPORTS if n.endswith(("-legacy", "-dynamo"))]
"""Exported in training mode, where Dropout is on."""
BATCH, STEPS = 4, 3
CLASSES = {"sklearn-binary": 2, "sklearn": 3, "torch-unet": 3}
"""Name's beginning -> how many classes the scores have, where it is not 5."""


def load(name: str) -> onnx.ModelProto:
    return onnx.load(FOLDER / f"{name}.onnx")


def draw_data(name: str, model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Draw inputs by what the model declares, and labels that fit its scores."""
    random, samples = np.random.default_rng(5), BATCH * STEPS
    data = {}
    for value in model.graph.input:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        data[value.name] = (
            random.standard_normal((samples, *dims), np.float32)
            if dtype == np.float32
            else random.integers(0, 20, (samples, *dims)).astype(dtype)
        )
    if name == "sklearn-regressor":
        return data | {"labels": random.standard_normal((samples, 1), np.float32)}
    classes = next((n for start, n in CLASSES.items() if name.startswith(start)), 5)
    shape = (samples, 8, 8) if "unet" in name else (samples,)
    return data | {"labels": random.integers(0, classes, shape)}


ReadSubject = Callable[[str], KeptSubject]


@pytest.fixture(scope="module")
def read_subject(tmp_path_factory: pytest.TempPathFactory) -> ReadSubject:
    """Read an export, of which pytest's processes make each bundle once together."""
    shared = build_once(tmp_path_factory, "exported-bundles", lambda folder: folder)

    @cache
    def read(name: str) -> KeptSubject:
        model = load(name)
        loss = "mse" if name == "sklearn-regressor" else "cross-entropy"
        folder = shared / name
        folder.mkdir(exist_ok=True)
        return KeptSubject(
            model=model, data=draw_data(name, model), batch=BATCH, loss=loss, folder=folder
        )

    return read


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[RecordingTransport]:
    """Record every connection that a trial makes."""
    return record_connections(monkeypatch, trials)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_exported_model_trains_split_as_unsplit_and_sends_what_is_explained(
    name: str, recordings: list[RecordingTransport], read_subject: ReadSubject
) -> None:
    subject = read_subject(name)
    for trial in try_places(subject, subject.places):
        assert trial.difference <= 1e-5, trial
    tried = [(place, target) for target in TARGETS for place in subject.places]
    for (place, target), recording in zip(tried, recordings, strict=True):
        bundle = subject.cut(*place, target)
        check_explained(bundle.client, recording, BATCH, {TRAIN: STEPS})


def test_every_exported_model_trains_on_stock_onnxruntime(
    portable_python: Path, tmp_path: Path, read_subject: ReadSubject
) -> None:
    subjects = {tmp_path / name: read_subject(name) for name in EXPORTS}
    bundles = {
        folder: (subject.cut(*subject.places[-1], "portable"), subject)
        for folder, subject in subjects.items()
    }
    for folder, trained in train_stock(portable_python, bundles).items():
        subject = subjects[folder]
        whole = train(subject.cut(None, None, "training"), subject)
        assert compare(trained, whole) <= 1e-4, folder.name


@pytest.mark.parametrize("name", [n for n in EXPORTS if n not in TRAINING])
def test_a_merged_model_predicts_as_the_exported_one(name: str, read_subject: ReadSubject) -> None:
    subject = read_subject(name)
    data = {key: array for key, array in subject.data.items() if key != "labels"}
    names, expected = run_original(name, data)
    place, *_ = subject.places
    merged = onnxruntime.InferenceSession(merge(subject.cut(*place, "training")))
    assert [value.name for value in merged.get_outputs()] == names
    for found, result in zip(merged.run(None, data), expected, strict=True):
        if isinstance(result, list):  # skl2onnx's dictionaries have become a tensor
            result = np.array([list(row.values()) for row in result], np.float32)
        np.testing.assert_allclose(found, result, rtol=1e-4, atol=1e-5)


def run_original(name: str, data: dict[str, np.ndarray]) -> tuple[list[str], list[Any]]:
    """Run the exported file; jax2onnx writes an opset that only onnx's reference knows."""
    if name.startswith("jax"):
        reference = ReferenceEvaluator(load(name))
        return list(reference.output_names), list(reference.run(None, data))
    session = onnxruntime.InferenceSession(str(FOLDER / f"{name}.onnx"))
    return [value.name for value in session.get_outputs()], session.run(None, data)
