"""Evaluations of models that end in a Softmax or Sigmoid which rounds their scores away."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.losses import Loss
from splitonnx.names import PREDICT
from splitonnx.optimizers import SGD
from splitonnx.partitioner.differentiation.activations.predicted_scores import predict_scores
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory

CUTS: list[dict[str, object]] = [
    {"at": None},
    {"at": "first"},
    {"at": "first", "tail_at": "scores"},
]
LOSSES = {"bce-with-logits": "Sigmoid", "cross-entropy": "Softmax"}
LEVELS = np.array([-95, -40, -18, -3, 0, 3, 17, 18, 40, 95], np.float32)


def build_model(activation: str) -> onnx.ModelProto:
    """Build a model whose scores are its inputs, behind two matrices of ones on the diagonal."""
    eye = np.eye(2, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["first"]),
            helper.make_node("MatMul", ["first", "w2"], ["scores"]),
            helper.make_node(activation, ["scores"], ["p"]),
            helper.make_node("Identity", ["p"], ["q"]),
        ],
        "confident",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("q", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(eye, "w1"), numpy_helper.from_array(eye, "w2")],
    )
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])


def draw_data(kind: str) -> dict[str, np.ndarray]:
    x = np.stack([LEVELS, LEVELS[::-1]], axis=1)
    rows = np.arange(len(x))
    if kind == "cross-entropy":
        return {"x": x, "labels": rows % 2}
    return {"x": x, "labels": np.stack([rows % 2, rows < 5], axis=1).astype(np.float32)}


def measure(kind: str, data: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return each label's loss in float64."""
    scores, labels = data["x"].astype(np.float64), data["labels"]
    if kind == "cross-entropy":
        terms: np.ndarray = np.logaddexp.reduce(scores, 1) - scores[range(len(labels)), labels]
    else:
        terms = np.logaddexp(0, scores) - labels * scores
    return terms


@pytest.mark.parametrize("where", CUTS, ids=["whole", "vanilla", "u-shape"])
@pytest.mark.parametrize(("kind", "activation"), LOSSES.items())
def test_confident_mistakes_count_as_much_in_evaluation_as_in_training(
    kind: str, activation: str, where: Mapping[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    data = draw_data(kind)
    loss = Loss(kind=kind)
    bundle = cut(build_model(activation), loss=loss, optimizer=SGD(lr=0.1), **where)  # type: ignore[arg-type]
    assert not caplog.messages
    link = None
    if bundle.server is not None:
        link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    metrics = ["auc", *(["perplexity"] if kind == "cross-entropy" else [])]
    with Client(bundle.client, link, threads=1) as client:
        found = client.evaluate(data, batch_size=3, metrics=metrics)
        predicted = client.predict({"x": data["x"]})
        trained = float(client.step(data)["loss"])
    wanted = measure(kind, data).mean()
    assert found["loss"] == pytest.approx(wanted, rel=1e-6)
    assert trained == pytest.approx(wanted, rel=1e-6)
    if kind == "cross-entropy":
        assert found["perplexity"] == pytest.approx(np.exp(wanted), rel=1e-5)
    assert found["auc"] == pytest.approx(rank(kind, data))
    assert predicted.keys() == {"q"}  # what only the evaluation reads is not shown
    merged = onnx.load_from_string(merge(bundle)).graph
    assert [value.name for value in merged.output] == ["q"]


def rank(kind: str, data: Mapping[str, np.ndarray]) -> float:
    """Return the share of pairs of a yes and a no in which the yes has the larger score."""
    scores, labels = data["x"].astype(np.float64), data["labels"]
    columns = list(zip(scores.T, labels.T, strict=True)) if labels.ndim == 2 else []
    if kind == "cross-entropy":
        columns = [(scores[:, 1] - scores[:, 0], labels)]
    areas = []
    for column, truth in columns:
        pairs = column[truth == 1][:, None] - column[truth == 0][None]
        areas.append(((pairs > 0) + (pairs == 0) / 2).mean())
    return float(np.mean(areas))


@pytest.mark.parametrize(("kind", "activation"), LOSSES.items())
def test_a_cut_behind_the_scores_is_remarked_on(
    kind: str, activation: str, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = cut(build_model(activation), at="first", tail_at="p", loss=kind)
    said = [line for line in caplog.messages if f"the result of a {activation}" in line]
    assert [line.split()[0] for line in said] == ["training", "evaluate"]
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    data = draw_data(kind)
    with Client(bundle.client, link, threads=1) as client:
        found = client.evaluate(data, batch_size=3)
        trained = float(client.step(data)["loss"])
    wanted = measure(kind, data).mean()
    assert abs(found["loss"] - wanted) > 1  # as the remarks say
    assert abs(trained - wanted) > 1


def test_scores_that_are_an_output_already_are_not_predicted_twice() -> None:
    model = build_model("Softmax")
    model.graph.output.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 2]))
    bundle = cut(model, at=None, output="q")
    assert bundle.client.manifest.phase(PREDICT).results == ("q", "scores")
    data = draw_data("cross-entropy")
    with Client(bundle.client, threads=1) as client:
        found = client.evaluate(data, batch_size=3)
    assert found["loss"] == pytest.approx(measure("cross-entropy", data).mean(), rel=1e-6)


def test_an_output_that_ends_otherwise_has_no_other_scores() -> None:
    graph = ir.from_proto(build_model("Sigmoid")).graph
    assert predict_scores(graph, graph, [("cross-entropy", "q", 1), ("mse", "q", 1)]) == {}
    assert [value.name for value in graph.outputs] == ["q"]
