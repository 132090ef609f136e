"""Models that end in their own loss: what they predict, and what merging writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from splitonnx.losses import Loss
from splitonnx.names import EVALUATE, PREDICT
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.verifications import verify
from tests.support.loss_references import build_network, draw_weights, measure, predict

OWN = Loss(kind="from-model", output="own_loss")
CUTS: list[dict[str, object]] = [
    {"at": None},
    {"at": ["hidden", "target"]},
    {"at": "product", "tail_at": "hidden"},
]


def with_loss(scores: str = "scores", outputs: Sequence[str] = ("scores",)) -> onnx.ModelProto:
    """Build the network with its loss in the graph, and with some of its tensors as outputs."""
    model = build_network()
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("target", TensorProto.INT64, ["N"]))
    graph.node.append(
        helper.make_node("SoftmaxCrossEntropyLoss", [scores, "target"], ["own_loss"], name="own")
    )
    del graph.output[:]
    for name, size in (("scores", 4), ("hidden", 5)):
        if name in outputs:
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]))
    graph.output.append(helper.make_tensor_value_info("own_loss", TensorProto.FLOAT, []))
    return model


def draw_data(rows: int = 10) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(4)
    return {"x": draw.normal(size=(rows, 3)).astype(np.float32), "target": np.arange(rows) % 4}


@pytest.mark.parametrize("where", CUTS, ids=["whole", "vanilla", "u-shape"])
def test_a_model_predicts_and_is_merged_without_its_loss_and_labels(
    where: Mapping[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    data = draw_data()
    bundle = cut(with_loss(), loss=OWN, **where)  # type: ignore[arg-type]
    assert not caplog.messages  # compared with the model given, and nothing is missing
    link = None
    if bundle.server is not None:
        link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        found = client.predict({"x": data["x"]})
        evaluated = client.evaluate(data, batch_size=4)
        assert float(client.step(data)["loss"]) == pytest.approx(evaluated["loss"], abs=1e-6)
    scores = predict({n: w.astype(np.float64) for n, w in draw_weights().items()}, data["x"])
    assert found.keys() == {"scores"}
    np.testing.assert_allclose(found["scores"], scores, atol=1e-6)
    wanted = measure(Loss(labels="target"), scores, data)[0]
    assert evaluated == {"loss": pytest.approx(wanted, abs=1e-6)}
    session = onnxruntime.InferenceSession(merge(bundle))
    assert [value.name for value in session.get_inputs()] == ["x"]
    np.testing.assert_allclose(session.run(None, {"x": data["x"]})[0], scores, atol=1e-6)
    assert verify(bundle, data, batch_size=4, steps=2).ok


@pytest.mark.parametrize("name", ["", "loss", "same"])
def test_a_models_loss_named_like_the_result_of_training_is_evaluated(name: str) -> None:
    model, data = with_loss(), draw_data()
    own = model.graph.node[-1]
    own.output[0] = "half"
    model.graph.node.append(helper.make_node("Add", ["half", "half"], ["loss"]))
    model.graph.output[-1].name = "loss"
    for node in model.graph.node:
        node.name = name
    bundle = cut(model, at=None, loss=Loss(kind="from-model", output="loss"))
    with Client(bundle.client, threads=1) as client:
        evaluated = client.evaluate(data, batch_size=4)
        trained = float(client.step(data)["loss"])
    scores = predict({n: w.astype(np.float64) for n, w in draw_weights().items()}, data["x"])
    wanted = 2 * measure(Loss(labels="target"), scores, data)[0]
    assert trained == pytest.approx(wanted, abs=1e-5)
    assert evaluated == {"loss": pytest.approx(wanted, abs=1e-5)}


def test_a_model_without_another_output_keeps_its_loss() -> None:
    bundle = cut(with_loss(outputs=()), at=None, loss=OWN)
    merged = onnx.load_from_string(merge(bundle)).graph
    assert [value.name for value in merged.output] == ["own_loss"]
    with Client(bundle.client, threads=1) as client:
        assert client.predict(draw_data(), batch_size=4)["own_loss"].shape == (3,)
        assert client.evaluate(draw_data(), batch_size=4)["loss"] > 0


@pytest.mark.parametrize(
    ("settings", "outputs", "told"),
    [
        ({"reduction": "sum"}, ("scores",), "is a sum over the batch"),
        ({"reduction": "sum"}, (), "is a sum over the batch"),
        ({"ignore_index": 3}, (), "make the scores an output"),
        ({"ignore_index": 3}, ("scores",), ""),
        ({}, (), ""),
    ],
    ids=str,
)
def test_cut_says_where_an_evaluation_depends_on_the_size_of_batches(
    settings: Mapping[str, object],
    outputs: Sequence[str],
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, data = with_loss(outputs=outputs), draw_data()
    for name, value in settings.items():
        model.graph.node[-1].attribute.append(helper.make_attribute(name, value))
    data["target"][:5] = 3
    bundle = cut(model, at=None, loss=OWN)
    assert [told in line for line in caplog.messages] == ([True] if told else [])
    with Client(bundle.client, threads=1) as client:
        found = {round(client.evaluate(data, batch_size=size)["loss"], 4) for size in (1, 3, 10)}
    assert (len(found) > 1) == bool(told)


def test_a_loss_of_a_tensor_that_is_not_predicted_stays_in_the_prediction() -> None:
    bundle = cut(with_loss(outputs=("hidden",)), at=None, loss=OWN)
    assert bundle.client.manifest.phase(PREDICT).results == ("hidden", "own_loss")
    assert {spec.name for spec in bundle.client.manifest.phase(PREDICT).data} == {"x", "target"}
    with Client(bundle.client, threads=1) as client:
        assert client.evaluate(draw_data(), batch_size=4)["loss"] > 0


def test_another_loss_of_the_same_model_leaves_its_own_alone() -> None:
    bundle = cut(with_loss(), at=None, loss=Loss(output="scores"))
    assert bundle.client.manifest.phase(PREDICT).results == ("scores", "own_loss")
    assert bundle.client.manifest.phase(EVALUATE).results == ("loss", "accuracy")


def test_a_models_loss_is_one_of_several() -> None:
    data = {**draw_data(), "labels": np.arange(10) % 4}
    losses = [OWN, Loss(output="scores", weight=0.5)]
    bundle = cut(with_loss(), at=None, loss=losses)
    with Client(bundle.client, threads=1) as client:
        found = client.evaluate(data, batch_size=4)
    assert found["loss.own_loss"] == pytest.approx(found["loss.scores"], abs=1e-6)
    assert found["loss"] == pytest.approx(1.5 * found["loss.scores"], abs=1e-6)
