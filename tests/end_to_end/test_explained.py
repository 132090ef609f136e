"""What `explain` says of each cut is what a recorded connection saw leave and arrive."""

from __future__ import annotations

import random
from functools import cache

import pytest

from splitonnx.bundles import Bundle
from splitonnx.names import PREDICT, TRAIN
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.partitioner.reports.u_shapes.pairs import list_pairs
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from tests.end_to_end.test_exports import draw_data, load
from tests.end_to_end.test_listed_cuts import (
    EXPORTS,
    NAMES,
    SMALL,
    list_listed,
    prepare_model,
    read_loss,
)
from tests.support.recordings import RecordingTransport, check_explained
from tests.support.zoo import ZOO

BATCH, STEPS = 4, 2
PAIRS = 6
"""As many pairs of a model are drawn, beside the recommended ones."""
FEW = ("residual", "batchnorm_trained", "jax-mlp", "sklearn-classifier", "torch-cnn-legacy")
"""Models of which one pair is tried each time; `make sweep` tries those of all, and all tensors."""
MODELS = [name for name in NAMES if name not in SMALL]

Ends = tuple[str, tuple[str, ...]]


@cache
def read_data(name: str) -> dict[str, object]:
    if name in EXPORTS:
        return {n: array[: BATCH * STEPS] for n, array in draw_data(name, load(name)).items()}
    return dict(ZOO[name].data(BATCH * STEPS))


def cut_model(name: str, at: str, tail_at: tuple[str, ...]) -> Bundle:
    return cut_prepared(prepare_model(name), at=at, tail_at=tail_at, loss=read_loss(name))


def list_tensors(name: str) -> list[Ends]:
    return [(tensor, ()) for tensor in list_listed(name)]


def list_some_pairs(name: str, count: int) -> list[Ends]:
    """List the recommended pairs and some others."""
    pairs = list_pairs(prepare_model(name))
    others = [pair for pair in pairs if not pair.recommended]
    drawn = random.Random(7).sample(others, min(count, len(others)))
    chosen = [pair for pair in pairs if pair.recommended] + drawn
    return [(pair.at[0], pair.tail_at) for pair in chosen]


def hold_explained(name: str, bundle: Bundle) -> None:
    """Train, evaluate and predict over a recorded connection, and compare."""
    assert bundle.server is not None
    recording = RecordingTransport(Executor(bundle.server, Engine(threads=1)))
    data = read_data(name)
    inputs = {key: array for key, array in data.items() if key != "labels"}
    with Client(bundle.client, recording, threads=1) as client:
        client.fit(data, epochs=1, batch_size=BATCH, eval_data=data)  # type: ignore[arg-type]
        client.predict(inputs, batch_size=BATCH)  # type: ignore[arg-type]
    check_explained(bundle.client, recording, BATCH, {TRAIN: STEPS, PREDICT: 2 * STEPS})


@pytest.mark.parametrize("name", FEW)
def test_a_u_shape_of_few_models_sends_what_is_explained(name: str) -> None:
    ends, *_ = list_some_pairs(name, 1)
    hold_explained(name, cut_model(name, *ends))


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_that_is_listed_sends_what_is_explained(name: str) -> None:
    for ends in list_tensors(name):
        hold_explained(name, cut_model(name, *ends))


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
def test_pairs_that_are_listed_send_what_is_explained(name: str) -> None:
    for ends in list_some_pairs(name, PAIRS):
        hold_explained(name, cut_model(name, *ends))
