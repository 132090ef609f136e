"""Losses: their values, their metrics, models that bring their own, models that end in Softmax."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx.bundles import Bundle
from splitonnx.errors import NotACut, UnsupportedModel, UsageError
from splitonnx.losses import Loss
from splitonnx.manifests import ScoredOutput, ScoreKind
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.verifications import verify
from tests.support.oracles import LOSSES
from tests.support.zoo import FLOAT, INT64, ZOO, Net


def open_client(bundle: Bundle) -> Client:
    if bundle.server is None:
        return Client(bundle.client, threads=1)
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    return Client(bundle.client, link, threads=1)


@pytest.mark.parametrize("name", ["chain", "mse", "l1", "bce"])
@pytest.mark.parametrize("at", [None, "act1"])
def test_evaluation_gives_the_mean_over_all_samples(name: str, at: str | None) -> None:
    entry = ZOO[name]
    data = entry.data(37)
    with open_client(cut(entry.build(), at=at, loss=entry.loss)) as client:
        (output,) = client.predict({"x": data["x"]}).values()
        found = client.evaluate(data, batch_size=8)
    expected = LOSSES[entry.loss](output.astype(np.float64), data["labels"])
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    if name == "chain":
        assert found["accuracy"] == pytest.approx((output.argmax(1) == data["labels"]).mean())
    elif name == "bce":
        assert found["accuracy"] == pytest.approx(((output > 0) == (data["labels"] > 0.5)).mean())
    else:
        assert found.keys() == {"loss"}


def test_the_client_knows_what_each_output_is_compared_with() -> None:
    model = ZOO["chain"].build()
    bundle = cut(model, at="act1")
    assert bundle.client.manifest.scored == (
        ScoredOutput(output="linear4", labels="labels", kind=ScoreKind.CLASSES, class_axis=1),
    )
    assert bundle.server is not None
    assert bundle.server.manifest.scored == ()


@pytest.mark.parametrize(
    ("kind", "activation", "scored"),
    [
        ("cross-entropy", "Softmax", ScoreKind.CLASSES),
        ("bce-with-logits", "Sigmoid", ScoreKind.BINARY),
        ("mse", "Softmax", ScoreKind.VALUES),
    ],
)
def test_metrics_read_the_scores_before_an_activation_that_the_loss_contains(
    kind: str, activation: str, scored: ScoreKind
) -> None:
    model = ZOO["chain"].build()
    (output,) = model.graph.output
    model.graph.node.append(helper.make_node(activation, [output.name], ["p"]))
    output.name = "p"
    losses = [Loss(kind=kind, name="first"), Loss(kind="l1", labels="targets", name="second")]
    first, second = cut(model, at=None, loss=losses).client.manifest.scored
    assert (first.kind, first.loss) == (scored, "first")
    assert first.output == ("p" if kind == "mse" else "splitonnx.scores.p")
    assert not first.are_probabilities
    assert (second.kind, second.loss, second.labels) == (ScoreKind.VALUES, "second", "targets")
    assert not second.are_probabilities


def with_own_loss(reads: str = "target") -> onnx.ModelProto:
    """The chain with its loss in the graph, a second input its labels."""
    model = ZOO["chain"].build()
    model.graph.input.append(helper.make_tensor_value_info(reads, INT64, ["N"]))
    model.graph.node.append(
        helper.make_node("SoftmaxCrossEntropyLoss", ["linear4", reads], ["own_loss"], name="own")
    )
    model.graph.output.append(helper.make_tensor_value_info("own_loss", FLOAT, []))
    onnx.checker.check_model(model)
    return model


def test_of_a_loss_of_the_user_s_own_nothing_is_known() -> None:
    bundle = cut(with_own_loss(), at=None, loss="from-model", output="own_loss")
    assert bundle.client.manifest.scored == ()


def test_a_model_that_ends_in_its_loss_trains_like_one_given_it() -> None:
    data = ZOO["chain"].data(40)
    given = {"x": data["x"], "target": data["labels"]}
    losses = []
    for model, options, batch in (
        (ZOO["chain"].build(), {}, data),
        (with_own_loss(), {"loss": "from-model", "output": "own_loss"}, given),
    ):
        bundle = cut(model, at="act1", tail_at="act3", **options)  # type: ignore[arg-type]
        assert verify(bundle, batch, batch_size=8).largest_difference == 0.0
        with open_client(bundle) as client:
            history = client.fit(batch, batch_size=8)
            losses.append([record.loss for record in history.steps])
            assert client.evaluate(batch)["loss"] > 0
    assert losses[0] == losses[1]


def test_labels_of_the_model_cross_only_when_named() -> None:
    options = {"loss": "from-model", "output": "own_loss"}
    with pytest.raises(NotACut) as caught:
        cut(with_own_loss(), at="act1", **options)  # type: ignore[arg-type]
    assert list(caught.value.missing) == ["target"]
    bundle = cut(with_own_loss(), at=["act1", "target"], **options)  # type: ignore[arg-type]
    data = ZOO["chain"].data(40)
    batch = {"x": data["x"], "target": data["labels"]}
    assert verify(bundle, batch, batch_size=8).largest_difference == 0.0


def vector_of_scores() -> onnx.ModelProto:
    net = Net()
    output = net.op("ReduceSum", net.op("MatMul", "x", net.weight("w", 4, 4), out="m"),
                    net.constant("axis", np.array([1])), out="y", keepdims=0)  # fmt: skip
    return net.finish({"x": (FLOAT, ["N", 4])}, output)


@pytest.mark.parametrize(
    ("build", "loss", "reason"),
    [
        (vector_of_scores, "cross-entropy", "scores of shape"),
        (vector_of_scores, "from-model", "scalar"),
    ],
)
def test_an_output_that_does_not_fit_the_loss_is_refused(
    build: Callable[[], onnx.ModelProto], loss: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        cut(build(), at="m", loss=loss)


def test_names_that_the_loss_needs_may_stand_within_the_model() -> None:
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w1", 4, 4), out="loss")
    hidden = net.op("Tanh", hidden, out="accuracy")
    net.op("MatMul", hidden, net.weight("w2", 4, 3), out="y")
    model = net.finish({"x": (TensorProto.FLOAT, ["N", 4])}, "y", 3)
    random = np.random.default_rng(0)
    data: dict[str, np.ndarray] = {
        "x": random.standard_normal((40, 4), np.float32),
        "labels": random.integers(0, 3, 40),
    }
    assert verify(cut(model, at="loss"), data, batch_size=8).largest_difference == 0.0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "--labels is empty"),
        ("loss", "training returns its results as 'loss' and 'accuracy'"),
        ("accuracy", "training returns its results"),
        ("act0@server", "names with '@'"),
        ("splitonnx.key", "are for what splitonnx adds"),
        ("x", "the model has a tensor of this name"),
        ("act0", "the model has a tensor of this name"),
    ],
)
def test_labels_do_not_take_the_name_of_anything_else(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        cut(ZOO["chain"].build(), at="act0", labels=name)
