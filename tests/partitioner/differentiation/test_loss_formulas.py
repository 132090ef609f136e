"""Settings of losses: values and gradients against numpy in float64, cut and not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np
import pytest

import splitonnx
from splitonnx.bundles import Bundle
from splitonnx.disclosures import list_labels, list_sent
from splitonnx.errors import LabelsNotPermitted, ValueOutOfRange
from splitonnx.losses import Loss
from splitonnx.names import Target
from splitonnx.optimizers import SGD
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import MemoryTransport, connect_in_memory
from splitonnx.verifications import verify
from tests.support.loss_references import (
    build_network,
    differentiate,
    draw_weights,
    measure,
    predict,
)

WEIGHTS = (0.5, 2.0, 0.0, 1.25)
CLASSES = [
    Loss(label_smoothing=0.1),
    Loss(class_weights=WEIGHTS),
    Loss(ignore_index=-100),
    Loss(ignore_index=2),
    Loss(sample_weights="trust"),
    Loss(label_smoothing=1.0),
    Loss(label_smoothing=0.3, class_weights=WEIGHTS, ignore_index=-100, sample_weights="trust"),
]
SMOOTHED = Loss(label_smoothing=0.4, class_weights=(0.0, 0.0, 0.0, 1.0))
NUMBERS = [Loss(kind=kind, sample_weights="trust") for kind in ("mse", "l1", "bce-with-logits")]
CUTS: list[dict[str, object]] = [
    {"at": None},
    {"at": "hidden"},
    {"at": "product", "tail_at": "hidden"},
]


def draw_data(loss: Loss, *, tokens: bool = False, rows: int = 8) -> dict[str, np.ndarray]:
    """Draw a batch; about a third of the labels are ignored if any may be."""
    draw = np.random.default_rng(7)
    shape = (rows, 3) if tokens else (rows,)
    data: dict[str, np.ndarray] = {"x": draw.normal(size=(*shape, 3)).astype(np.float32)}
    if loss.kind == "cross-entropy":
        labels = draw.integers(0, 4, shape)
        if loss.ignore_index is not None:
            labels[draw.random(shape) < 0.3] = loss.ignore_index
        data["labels"] = labels
    else:
        data["labels"] = draw.random((*shape, 4)).astype(np.float32)
    if loss.sample_weights is not None:
        data["trust"] = draw.random(rows).astype(np.float32)
    return data


def connect(bundle: Bundle) -> MemoryTransport | None:
    server = bundle.server
    return None if server is None else connect_in_memory(Executor(server, Engine(threads=1)))


def train_once(
    losses: Loss | list[Loss],
    data: Mapping[str, np.ndarray],
    where: Mapping[str, object],
    target: Target = "training",
    **network: object,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Make one step of plain gradient descent; return the results and the gradients."""
    bundle = cut(
        build_network(**network),  # type: ignore[arg-type]
        loss=losses,
        optimizer=SGD(lr=1.0),
        client_target=target,
        server_target=target,
        check=False,
        **where,  # type: ignore[arg-type]
    )
    link = connect(bundle)
    before = {name: w for party in bundle.parties.values() for name, w in party.weights.items()}
    with Client(bundle.client, link, threads=1) as client:
        results = {name: float(value) for name, value in client.step(data).items()}
        after = dict(client.state())
        if link:
            link.drain()
            after |= link.executor.state()
    return results, {name: before[name].astype(np.float64) - after[name] for name in before}


def assert_as_reference(
    loss: Loss, where: Mapping[str, object], target: Target, *, tokens: bool = False
) -> None:
    data = draw_data(loss, tokens=tokens)
    results, gradients = train_once(loss, data, where, target, tokens=tokens)
    exact = {name: w.astype(np.float64) for name, w in draw_weights().items()}
    wanted = measure(loss, predict(exact, data["x"]), data)[0]
    assert results["loss"] == pytest.approx(wanted, abs=1e-6)
    slopes = differentiate(lambda w: measure(loss, predict(w, data["x"]), data)[0], exact)
    for name, slope in slopes.items():
        np.testing.assert_allclose(gradients[name], slope, atol=1e-6)


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("loss", [*CLASSES, *NUMBERS], ids=repr)
def test_losses_and_gradients_are_those_of_the_definition(loss: Loss, target: Target) -> None:
    assert_as_reference(loss, {"at": None}, target)


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("where", CUTS, ids=["whole", "vanilla", "u-shape"])
def test_losses_of_tokens_are_the_same_wherever_the_model_is_cut(
    where: Mapping[str, object], target: Target
) -> None:
    loss = msgspec.structs.replace(CLASSES[-1], class_axis=-1)
    assert_as_reference(loss, where, target, tokens=True)


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize(
    ("loss", "labels", "trust"),
    [
        (Loss(ignore_index=-100), -100, 1.0),
        (Loss(class_weights=WEIGHTS, label_smoothing=0.2), 2, 1.0),
        (Loss(sample_weights="trust"), 1, 0.0),
    ],
    ids=["ignored", "class of no weight", "samples of no weight"],
)
def test_a_batch_of_which_nothing_counts_has_no_loss_and_no_gradient(
    loss: Loss, labels: int, trust: float, target: Target
) -> None:
    data = draw_data(loss)
    data["labels"][:] = labels
    data["trust"] = np.full(8, trust, np.float32)
    results, gradients = train_once(loss, data, {"at": "hidden"}, target)
    assert results["loss"] == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_accuracy_leaves_out_what_is_ignored_and_weighs_samples() -> None:
    loss = CLASSES[-1]
    data = draw_data(loss)
    results, _ = train_once(loss, data, {"at": None})
    right = predict(draw_weights(), data["x"]).argmax(-1) == data["labels"]
    shares = (data["labels"] != -100) * data["trust"]
    assert results["accuracy"] == pytest.approx((right * shares).sum() / shares.sum(), abs=1e-6)


@pytest.mark.parametrize("where", CUTS[1:], ids=["vanilla", "u-shape"])
def test_labels_other_than_classes_and_the_ignored_one_are_refused(
    where: Mapping[str, object],
) -> None:
    loss = Loss(ignore_index=-100)
    data = draw_data(loss)
    data["labels"][0] = -1
    with pytest.raises(ValueOutOfRange, match="holds -1; allowed are 0 to 3, and -100"):
        train_once(loss, data, where)


BOTH = [
    Loss(output="scores", label_smoothing=0.1, weight=0.5),
    Loss(output="scores2", labels="side", ignore_index=-100, weight=2.0, name="aside"),
]


def draw_both(rows: int = 8) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(8)
    data = draw_data(BOTH[0], rows=rows)
    return {**data, "side": np.where(draw.random(rows) < 0.4, -100, draw.integers(0, 2, rows))}


def measure_both(weights: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]) -> list[float]:
    scores = [predict(weights, data["x"], last) for last in ("w2", "w3")]
    return [measure(loss, each, data)[0] for loss, each in zip(BOTH, scores, strict=True)]


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("where", CUTS, ids=["whole", "vanilla", "u-shape"])
def test_several_losses_are_added_up_and_reported(
    where: Mapping[str, object], target: Target
) -> None:
    data = draw_both()
    results, gradients = train_once(list(BOTH), data, where, target, outputs=2)
    side = np.random.default_rng(6).normal(0, 0.6, (5, 2)).astype(np.float32)
    weights = {name: w.astype(np.float64) for name, w in {**draw_weights(), "w3": side}.items()}
    first, second = measure_both(weights, data)
    assert results.keys() == {
        "loss",
        "loss.scores",
        "accuracy.scores",
        "loss.aside",
        "accuracy.aside",
    }
    assert results["loss.scores"] == pytest.approx(first, abs=1e-6)
    assert results["loss.aside"] == pytest.approx(second, abs=1e-6)
    assert results["loss"] == pytest.approx(0.5 * first + 2 * second, abs=1e-6)

    def total(at: Mapping[str, np.ndarray]) -> float:
        first, second = measure_both(at, data)
        return 0.5 * first + 2 * second

    for name, slope in differentiate(total, weights).items():
        np.testing.assert_allclose(gradients[name], slope, atol=1e-6)


@pytest.mark.parametrize("where", CUTS, ids=["whole", "vanilla", "u-shape"])
def test_evaluation_of_batches_is_that_of_the_whole_data(where: Mapping[str, object]) -> None:
    """Batches of 4 weigh by what counts in them; in the second, nothing does."""
    data = draw_both(rows=10)
    data["trust"] = np.arange(10, dtype=np.float32)
    data["side"][4:8] = -100
    first, second = BOTH
    losses = [msgspec.structs.replace(first, sample_weights="trust", class_weights=WEIGHTS), second]
    bundle = cut(build_network(outputs=2), loss=losses, check=False, **where)  # type: ignore[arg-type]
    with Client(bundle.client, connect(bundle), threads=1) as client:
        found = client.evaluate(data, batch_size=4)
        scores = client.predict({"x": data["x"]}, batch_size=10)
    wanted = [
        measure(loss, scores[loss.output or ""].astype(np.float64), data)[0] for loss in losses
    ]
    right = [scores[name].argmax(1) == data[own] for name, own in
             (("scores", "labels"), ("scores2", "side"))]  # fmt: skip
    assert found == pytest.approx(
        {
            "loss": 0.5 * wanted[0] + 2 * wanted[1],
            "loss.scores": wanted[0],
            "loss.aside": wanted[1],
            "accuracy.scores": np.average(right[0], weights=data["trust"]),
            "accuracy.aside": right[1][data["side"] != -100].mean(),
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("loss", [*CLASSES, *NUMBERS, SMOOTHED], ids=repr)
def test_evaluation_does_not_depend_on_the_size_of_batches(loss: Loss) -> None:
    """Alone, a label of a class of weight 0 does not count, but its smoothing has a term."""
    data = draw_data(loss, rows=10)
    if loss.sample_weights is not None:
        data["trust"] = np.array([2, 1, 0, 0, 1, 1, 2, 2, 3, 3], np.float32)
    with Client(cut(build_network(), at=None, loss=loss, check=False).client) as client:
        found = [client.evaluate(data, batch_size=size) for size in (1, 2, 4, 10)]
        scores = client.predict({"x": data["x"]})["scores"].astype(np.float64)
        perplexity = client.evaluate(data, batch_size=1, metrics=["perplexity"]) if (
            loss.kind == "cross-entropy"
        ) else {}  # fmt: skip
    wanted = measure(loss, scores, data)[0]
    assert [each["loss"] for each in found] == pytest.approx([wanted] * 4, rel=1e-5)
    for each in found[:-1]:
        assert each == pytest.approx(found[-1], rel=1e-5)
    if perplexity:
        bare = msgspec.structs.replace(loss, label_smoothing=0.0, class_weights=())
        assert math.log(perplexity["perplexity"]) == pytest.approx(
            measure(bare, scores, data)[0], rel=1e-5
        )


def test_several_losses_are_evaluated_alike_in_batches_of_any_size() -> None:
    data = {**draw_both(rows=10), "labels": np.array([2, 2, 2, 2, 0, 1, 2, 3, 2, 2])}
    first, second = BOTH
    losses = [msgspec.structs.replace(first, class_weights=WEIGHTS), second]
    bundle = cut(build_network(outputs=2), loss=losses, at=None, check=False)
    with Client(bundle.client) as client:
        found = [client.evaluate(data, batch_size=size) for size in (1, 2, 10)]
        scores = client.predict({"x": data["x"]})
    wanted = [
        measure(loss, scores[loss.output or ""].astype(np.float64), data)[0] for loss in losses
    ]
    for each in found:
        assert each["loss.scores"] == pytest.approx(wanted[0], rel=1e-5)
        assert each["loss"] == pytest.approx(0.5 * wanted[0] + 2 * wanted[1], rel=1e-5)


def test_evaluation_of_data_of_which_nothing_counts_is_0() -> None:
    data = draw_data(Loss())
    data["labels"][:] = -100
    with Client(cut(build_network(), at=None, loss=Loss(ignore_index=-100)).client) as client:
        assert client.evaluate(data, batch_size=4) == {"loss": 0, "accuracy": 0}


def test_split_training_is_verified_with_the_same_losses() -> None:
    data = draw_both(rows=16)
    bundle = cut(build_network(outputs=2), loss=BOTH, at="product", tail_at="hidden", check=False)
    assert verify(bundle, data, steps=3, batch_size=4).ok


def test_labels_and_weights_of_samples_leave_only_when_named() -> None:
    with pytest.raises(LabelsNotPermitted):
        splitonnx.cut(build_network(outputs=2), loss=BOTH, at="hidden")
    bundle = splitonnx.cut(build_network(outputs=2), loss=BOTH, at="hidden", send_labels=True)
    assert list_labels(bundle.client.manifest) == ("labels", "side")
    assert [t.name for t in list_sent(bundle.client.manifest, "train").tensors] == [
        "activation 'hidden'",
        "labels",
        "labels 'side'",
    ]
    kept = splitonnx.cut(build_network(outputs=2), loss=BOTH, at="product", tail_at="hidden")
    assert [t.kind for t in list_sent(kept.client.manifest, "train").tensors] == [
        "activation",
        "gradient",
    ]
