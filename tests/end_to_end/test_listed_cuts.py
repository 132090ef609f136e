"""`inspect` lists exactly the tensors that `cut` takes, for the zoo and for exports."""

from __future__ import annotations

from functools import cache

import onnx
import pytest

from splitonnx.errors import CutError
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from tests.conftest import ROOT
from tests.support.small_models import MODELS
from tests.support.zoo import ZOO

EXPORTS = sorted(path.stem for path in (ROOT / "tests" / "exports").glob("*.onnx"))
SMALL = ("04_aux_head", "29_batch_axis_1", "34_passed_through", "41_lost_detach")
QUICK = ("jax-mlp", "keras-mlp", "sklearn-classifier", "torch-cnn-legacy")
"""Exports that are tried each time; the others take a minute, and `make sweep` tries them."""
NAMES = [*(name for name, entry in ZOO.items() if len(entry.inputs) == 1), *SMALL, *EXPORTS]

SOME = [
    pytest.param(name, marks=pytest.mark.sweep if name in EXPORTS and name not in QUICK else ())
    for name in NAMES
]


def read_loss(name: str) -> str:
    if name in ZOO:
        return ZOO[name].loss
    return "mse" if name in SMALL or name == "sklearn-regressor" else "cross-entropy"


@cache
def prepare_model(name: str) -> PreparedModel:
    if name in ZOO:
        return prepare(open_model(ZOO[name].build()))
    folder = MODELS if name in SMALL else ROOT / "tests" / "exports"
    return prepare(open_model(onnx.load(folder / f"{name}.onnx")))


def list_tensors(name: str) -> list[str]:
    """List every tensor that the model computes for prediction."""
    graph = prepare_model(name).inference.graph
    return [value.name for node in graph for value in node.outputs if value.name]


def list_listed(name: str) -> list[str]:
    return [found.tensor for found in list_cuts(prepare_model(name), None)]


@pytest.mark.parametrize("name", SOME)
def test_a_tensor_that_is_not_listed_is_refused(name: str) -> None:
    prepared, listed = prepare_model(name), set(list_listed(name))
    for tensor in list_tensors(name):
        if tensor not in listed:
            with pytest.raises(CutError):
                cut_prepared(prepared, at=tensor, loss=read_loss(name))


@pytest.mark.parametrize("name", SOME)
def test_the_first_and_the_last_tensor_listed_are_taken(name: str) -> None:
    listed = list_listed(name)
    for tensor in {*listed[:1], *listed[-1:]}:
        cut_prepared(prepare_model(name), at=tensor, loss=read_loss(name))


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_listed_is_taken(name: str) -> None:
    for tensor in list_listed(name):
        cut_prepared(prepare_model(name), at=tensor, loss=read_loss(name))
