"""The small models under ``tests/cases/models``, and what a bundle of one is held against.

What a model means is said by onnx's own evaluator, which runs the model as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime

from splitonnx.bundles import Bundle
from splitonnx.partitioner.merges import merge
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from tests.conftest import ROOT
from tests.support.case_trials import run_step
from tests.support.derivatives import hold_steps
from tests.support.oracles import make_evaluator

Arrays = dict[str, np.ndarray]
MODELS = ROOT / "tests" / "cases" / "models"
RTOL, ATOL = 1e-5, 1e-6


def load_model(name: str) -> onnx.ModelProto:
    """Load a model by its file's name without the ending."""
    return onnx.load(MODELS / f"{name}.onnx")


def load_data(name: str, rows: int | None = None) -> Arrays:
    """Load a model's data, its labels included; ``rows`` limits how many."""
    with np.load(MODELS / f"{name}.npz") as data:
        return {key: data[key][:rows] for key in data.files}


def evaluate(model: onnx.ModelProto, data: Mapping[str, np.ndarray]) -> Arrays:
    """Evaluate a model as it is, by onnx's own evaluator."""
    evaluator = make_evaluator(model)
    results = evaluator.run(None, {name: data[name] for name in evaluator.input_names})
    assert isinstance(results, list)
    return dict(zip(evaluator.output_names, map(np.asarray, results), strict=True))


def hold_predictions(
    bundle: Bundle, model: onnx.ModelProto, data: Mapping[str, np.ndarray]
) -> None:
    """Hold what the parts predict, and what the merged model does, against the model as it is.

    Both run in sessions that optimize.
    """
    expected = evaluate(model, data)
    inputs = {value.name: data[value.name] for value in model.graph.input}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(merge(bundle), options)
    merged = dict(
        zip(
            [output.name for output in session.get_outputs()],
            session.run(None, inputs),
            strict=True,
        )
    )
    link = None
    if bundle.server is not None:
        link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        predicted = client.predict([inputs])  # as one batch, whatever its axes mean
    for name, array in expected.items():
        np.testing.assert_allclose(merged[name], array, rtol=RTOL, atol=ATOL)
        np.testing.assert_allclose(predicted[name], array, rtol=RTOL, atol=ATOL)


def hold_step(
    bundle: Bundle,
    model: onnx.ModelProto,
    data: Mapping[str, np.ndarray],
    trained: Sequence[str],
    loss: str = "cross-entropy",
) -> None:
    """Hold the gradients of an uncut bundle against differences of the model as it is."""
    hold_steps([run_step(bundle, data)], model, loss, data, trained)
