"""Metrics of evaluations of cut models, against scikit-learn on the models' predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from onnx import helper
from sklearn.metrics import f1_score, recall_score, roc_auc_score, top_k_accuracy_score

from splitonnx.bundles import Bundle
from splitonnx.errors import UnusableData, UsageError
from splitonnx.losses import Loss
from splitonnx.optimizers import SGD
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import Evaluation
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.stopping import EarlyStopping
from tests.support.zoo import ZOO

DATA: Mapping[str, np.ndarray] = ZOO["chain"].data(37)


def open_client(bundle: Bundle) -> Client:
    if bundle.server is None:
        return Client(bundle.client, threads=1)
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    return Client(bundle.client, link, threads=1)


@pytest.mark.parametrize("where", [{"at": None}, {"at": "act1"}, {"at": "act1", "tail_at": "act2"}])
def test_an_evaluation_computes_the_metrics_that_are_named(where: dict[str, object]) -> None:
    bundle = cut(ZOO["chain"].build(), optimizer=SGD(), **where)  # type: ignore[arg-type]
    with open_client(bundle) as client:
        (scores,) = client.predict({"x": DATA["x"]}).values()
        plain = client.evaluate(DATA, batch_size=8)
        found = client.evaluate(DATA, batch_size=8, metrics=["f1", "top-2", "auc", "perplexity"])
    assert plain.keys() == {"loss", "accuracy"}
    odds = np.exp(scores.astype(np.float64))
    odds /= odds.sum(axis=1, keepdims=True)
    labels, classes = DATA["labels"], np.arange(scores.shape[1])
    expected = {
        **plain,
        "f1": f1_score(labels, scores.argmax(1), average="macro", zero_division=0),
        "top-2": top_k_accuracy_score(labels, scores, k=2, labels=classes),
        "auc": roc_auc_score(labels, odds, multi_class="ovr"),
        "perplexity": math.exp(plain["loss"]),
    }
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ends", ["", "Sigmoid"])
def test_answers_yes_or_no_are_measured_with_and_without_a_sigmoid_at_the_end(ends: str) -> None:
    model, data = ZOO["bce"].build(), ZOO["bce"].data(37)
    if ends:
        (output,) = model.graph.output
        model.graph.node.append(helper.make_node(ends, [output.name], ["p"]))
        output.name = "p"
    truth = (data["labels"] > 0.5).astype(int)
    with open_client(cut(model, at=None, loss="bce-with-logits")) as client:
        (scores,) = client.predict({"x": data["x"]}).values()
        found = client.evaluate(data, batch_size=8, metrics=["f1", "recall-micro", "auc"])
    guess = (scores > (0.5 if ends else 0)).astype(int)
    assert scores.shape[1] > 1
    assert found["f1"] == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))
    assert found["recall-micro"] == pytest.approx(recall_score(truth, guess, average="micro"))
    assert found["auc"] == pytest.approx(roc_auc_score(truth, scores))


def test_evaluations_of_a_fit_have_the_metrics_and_training_stops_by_them() -> None:
    seen: list[Evaluation] = []
    with open_client(cut(ZOO["chain"].build(), at=None, optimizer=SGD(lr=0.1))) as client:
        history = client.fit(
            DATA,
            epochs=3,
            batch_size=8,
            eval_data=DATA,
            metrics=["recall-weighted", "top-2"],
            stopping=EarlyStopping(metric="recall-weighted", patience=None),
            on_epoch=seen.append,
        )
        kept = client.evaluate(DATA, batch_size=8, metrics=["recall-weighted"])
    assert history.evaluations == seen
    figures = [one.metrics["recall-weighted"] for one in seen]
    assert [list(one.metrics) for one in seen] == [
        ["loss", "accuracy", "recall-weighted", "top-2"]
    ] * 3
    assert figures == pytest.approx([one.metrics["accuracy"] for one in seen])  # as it is for one
    assert history.best is not None
    assert history.best.value == kept["recall-weighted"] == max(figures)


def test_several_losses_have_metrics_of_their_own() -> None:
    losses = [
        Loss(kind="cross-entropy", name="class", ignore_index=-1, sample_weights="w"),
        Loss(kind="mse", labels="targets", name="scores", weight=0.5),
    ]
    rng = np.random.default_rng(3)
    weights = rng.uniform(0.5, 2, 37).astype(np.float32)
    labels = np.where(rng.random(37) < 0.2, -1, DATA["labels"])
    with open_client(cut(ZOO["chain"].build(), at=None, loss=losses)) as client:
        (scores,) = client.predict({"x": DATA["x"]}).values()
        data = {**DATA, "labels": labels, "targets": np.zeros_like(scores), "w": weights}
        found = client.evaluate(data, batch_size=8, metrics=["f1", "f1.class", "mse.scores"])
        with pytest.raises(UsageError, match=r"mse\.class names no loss"):
            client.evaluate(data, metrics=["mse.class"])
    kept = labels != -1
    expected = f1_score(
        labels[kept], scores.argmax(1)[kept], average="macro", zero_division=0,
        sample_weight=weights[kept],
    )  # fmt: skip
    assert found["f1"] == found["f1.class"] == pytest.approx(expected)
    assert found["mse.scores"] == pytest.approx(found["loss.scores"], rel=1e-5)
    accuracy = np.average(scores.argmax(1)[kept] == labels[kept], weights=weights[kept])
    assert found["accuracy.class"] == pytest.approx(accuracy)


def test_a_metric_that_the_data_do_not_define_is_nan_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = {**DATA, "labels": np.zeros_like(DATA["labels"])}
    with open_client(cut(ZOO["chain"].build(), at=None)) as client:
        found = client.evaluate(data, metrics=["auc", "f1"])
        assert math.isnan(found["auc"])
        assert not math.isnan(found["f1"])
        (record,) = caplog.records
        assert "the metric auc is not defined: all labels are of class 0" in record.message
        client.evaluate(data, metrics=["auc"])
        assert len(caplog.records) == 1  # told once
        with pytest.raises(UnusableData, match="stop by the metric 'auc', which is not defined"):
            client.fit(data, eval_data=data, metrics=["auc"], stopping=EarlyStopping(metric="auc"))


def test_metrics_without_data_to_evaluate_on_are_refused() -> None:
    with (
        open_client(cut(ZOO["chain"].build(), at=None)) as client,
        pytest.raises(UsageError, match="metrics need data to evaluate on"),
    ):
        client.fit(DATA, metrics=["f1"])
