"""A step of several micro-batches equals the step on the whole batch, wherever a model is cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import UnusableData, UsageError
from splitonnx.losses import Loss
from splitonnx.manifests import Role
from splitonnx.messages import TaskKey
from splitonnx.names import Target
from splitonnx.optimizers import SGD, AdamW
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut, cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts as list_tensors
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import MemoryTransport, connect_in_memory
from splitonnx.verifications import verify
from tests.support.tiled_stages import sized
from tests.support.wholes import share_wholes
from tests.support.zoo import ZOO, Arrays

ROWS, STEPS, PARTS = 7, 3, 3
"""Three micro-batches of 3, 2 and 2 rows make a step."""
BY_MICRO_BATCH = {"batchnorm_trained", "dropout"}
"""Networks that compute something else of a micro-batch than of the batch."""
FUSED = {"attention"}
"""Networks whose whole has a pattern that the builder fuses, which a cut may go through."""


@pytest.fixture(autouse=True)
def wholes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build what both cuts of a network are compared with once a network."""
    share_wholes(monkeypatch)


@cache
def prepare_zoo(name: str) -> PreparedModel:
    return prepare(open_model(ZOO[name].build()))


@cache
def list_cuts(name: str) -> tuple[str, ...]:
    return tuple(found.tensor for found in list_tensors(prepare_zoo(name), None))


def cut_zoo(name: str, shape: str, target: Target = "training") -> Bundle:
    cuts = list_cuts(name)
    at, tail = {
        "whole": (None, ()),
        "vanilla": (cuts[len(cuts) // 2], ()),
        "U-shaped": (cuts[0], cuts[-1]),
    }[shape]
    return cut_prepared(
        prepare_zoo(name),
        at=at,
        tail_at=tail,
        loss=ZOO[name].loss,
        optimizer=AdamW(lr=1e-2, clip_norm=1.0),
        client_target=target,
        server_target=target,
    )


@contextmanager
def connect(bundle: Bundle) -> Iterator[tuple[Client, MemoryTransport | None]]:
    party = bundle.server
    link = None if party is None else connect_in_memory(Executor(party, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        yield client, link


def train(
    bundle: Bundle,
    batches: list[dict[str, np.ndarray]],
    accumulate: int,
    learning_rate: float | None = None,
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    with connect(bundle) as (client, link):
        results = [
            client.step(batch, accumulate=accumulate, learning_rate=learning_rate)
            for batch in batches
        ]
        state = dict(client.state())
        if link is not None:
            link.drain()
            state |= link.executor.state()
        return state, results


@pytest.mark.parametrize("shape", ["vanilla", "U-shaped"])
@pytest.mark.parametrize("name", ZOO)
def test_a_cut_accumulates_as_the_whole_model(name: str, shape: str) -> None:
    data = ZOO[name].data(ROWS * STEPS)
    bundle = cut_zoo(name, shape)
    found = verify(bundle, data, steps=STEPS, batch_size=ROWS, accumulate=PARTS)
    assert len(found.steps) == STEPS
    assert found.largest_difference <= (1e-5 if name in FUSED else 0.0)


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("shape", ["whole", "U-shaped"])
def test_large_sums_grow_in_place_with_the_same_bits(shape: str, target: Target) -> None:
    """Each micro-batch adds to the sums of the one before it, and the update reads the last."""
    batches = [ZOO["convolutions"].data(ROWS, seed=seed) for seed in range(STEPS)]
    bundle = cut_zoo("convolutions", shape, target)
    state, results = train(bundle, batches, PARTS)
    with sized(16, 64):
        tiled, told = train(bundle, batches, PARTS)
        executor = Executor(bundle.client, Engine(threads=1))
        executor.prepare("accumulate")
        assert executor._loaded["accumulate", "accumulate"].zeros
    assert {name: a.tobytes() for name, a in tiled.items()} == {
        name: a.tobytes() for name, a in state.items()
    }
    assert told == results


def take_step(executor: Executor, parts: list[dict[str, np.ndarray]], until: int) -> None:
    """Take the first ``until`` tasks of a step of micro-batches and their update."""
    for number in range(until):
        phase = "accumulate" if number < len(parts) else "update"
        key = TaskKey("a" * 32, phase, executor.step, number)
        data = parts[number] if number < len(parts) else {}
        executor.begin(key, data=data, seed=1, learning_rate=0.01)
        assert list(executor.advance(key)) == []
        executor.finish(key)


def test_what_an_abandoned_step_added_in_place_is_in_no_later_step() -> None:
    weight = np.array(1 / PARTS, np.float32)
    parts = [ZOO["convolutions"].data(ROWS, seed=seed) for seed in range(PARTS)]
    parts = [{**part, "splitonnx.weight": weight} for part in parts]
    bundle = cut_zoo("convolutions", "whole")
    with sized(16, 64):
        calm, rough = (Executor(bundle.client, Engine(threads=1)) for _ in range(2))
        for step in range(STEPS):
            take_step(calm, parts, PARTS + 1)
            take_step(rough, parts[::-1], step + 1)  # as many micro-batches
            rough.abandon(TaskKey("a" * 32, "accumulate", step, step))
            take_step(rough, parts, PARTS + 1)
            assert rough._loaded["accumulate", "accumulate"].zeros
    assert {name: a.tobytes() for name, a in rough.state().items()} == {
        name: a.tobytes() for name, a in calm.state().items()
    }


@pytest.mark.parametrize("name", [name for name in ZOO if name not in BY_MICRO_BATCH])
@pytest.mark.parametrize("target", ["training", "portable"])
def test_micro_batches_make_the_step_of_the_whole_batch(name: str, target: Target) -> None:
    batches = [ZOO[name].data(ROWS, seed=seed) for seed in range(STEPS)]
    bundle = cut_zoo(name, "vanilla", target)
    state, results = train(bundle, batches, PARTS)
    expected, told = train(bundle, batches, 1)
    for key, array in expected.items():
        if "#" not in key:  # Adam's own state is as near as the gradients are, relatively
            np.testing.assert_allclose(state[key], array, rtol=0, atol=1e-5, err_msg=key)
    for made, result in zip(results, told, strict=True):
        assert made.keys() == result.keys()
        for key in result:
            np.testing.assert_allclose(made[key], result[key], rtol=1e-5, err_msg=key)


def test_running_statistics_follow_each_micro_batch() -> None:
    batch = ZOO["batchnorm_trained"].data(7)
    parts = [
        {name: array[rows] for name, array in batch.items()} for rows in (slice(4), slice(4, 7))
    ]
    bundle = cut_zoo("batchnorm_trained", "vanilla")
    statistics = [
        spec.tensor.name
        for party in bundle.parties.values()
        for spec in party.manifest.state
        if spec.role is Role.BUFFER
    ]
    assert len(statistics) > 1
    state, _ = train(bundle, [batch], 2)
    apart, _ = train(bundle, parts, 1, learning_rate=0.0)  # no step between them
    for name in statistics:
        np.testing.assert_array_equal(state[name], apart[name])


def build_linear() -> onnx.ModelProto:
    """Build scores = (x @ first) @ second, which can be cut between the two."""
    random = np.random.default_rng(3)
    first = numpy_helper.from_array(random.standard_normal((4, 5), np.float32), "first")
    second = numpy_helper.from_array(random.standard_normal((5, 3), np.float32), "second")
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["hidden"], name="one"),
        helper.make_node("MatMul", ["hidden", "second"], ["scores"], name="two"),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["N", 3])],
        [first, second],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


CLASS_WEIGHTS = (0.5, 3.0, 1.0)
LINEAR_LOSSES = {
    "plain": Loss(),
    "class weights": Loss(class_weights=CLASS_WEIGHTS),
    "ignored labels": Loss(ignore_index=-100),
    "sample weights": Loss(sample_weights="w"),
    "all of them, smoothed": Loss(
        class_weights=CLASS_WEIGHTS, ignore_index=-100, sample_weights="w", label_smoothing=0.1
    ),
}


def compute_step(
    batch: Mapping[str, np.ndarray], weights: list[np.ndarray], loss: Loss, rate: float
) -> tuple[list[np.ndarray], float]:
    """Take a step of gradient descent on the whole batch, in float64 and from the formula."""
    first, second = (array.astype(np.float64) for array in weights)
    x, labels = batch["x"].astype(np.float64), batch["labels"]
    counts = labels != -100 if loss.ignore_index is not None else np.ones(len(x), bool)
    index = np.where(counts, labels, 0)
    per_class = np.array(loss.class_weights or (1.0, 1.0, 1.0))
    factor = counts * (batch["w"].astype(np.float64) if loss.sample_weights else 1.0)
    total = (factor * per_class[index]).sum()
    scores = x @ first @ second
    log_prob = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    targets = (1 - loss.label_smoothing) * np.eye(3)[index] + loss.label_smoothing / 3
    each = targets * per_class * factor[:, None]  # the weight of each log-probability
    value = -(each * log_prob).sum() / total
    back = (each.sum(1, keepdims=True) * np.exp(log_prob) - each) / total
    gradients = [x.T @ (back @ second.T), (x @ first).T @ back]
    return [w - rate * g for w, g in zip((first, second), gradients, strict=True)], value


@pytest.mark.parametrize("at", [None, "hidden"])
@pytest.mark.parametrize("name", LINEAR_LOSSES)
def test_weights_and_ignored_labels_count_as_in_the_whole_batch(name: str, at: str | None) -> None:
    loss, random = LINEAR_LOSSES[name], np.random.default_rng(5)
    labels = np.array([0, -100, -100, 1, 1, 2, 0]) if loss.ignore_index else np.arange(7) % 3
    batch: Arrays = {
        "x": random.standard_normal((7, 4), np.float32),
        "labels": labels.astype(np.int64),
        "w": np.array([1, 2, 3, 0, 0.5, 4, 1], np.float32),
    }
    bundle = cut(build_linear(), at=at, loss=loss, optimizer=SGD(lr=0.3))
    initial = [
        p.weights[n] for n in ("first", "second") for p in bundle.parties.values() if n in p.weights
    ]
    given: Arrays = {n: a for n, a in batch.items() if n != "w" or loss.sample_weights}
    state, (results,) = train(bundle, [given], 4)
    (first, second), value = compute_step(batch, initial, loss, 0.3)
    np.testing.assert_allclose(state["first"], first, atol=1e-6)
    np.testing.assert_allclose(state["second"], second, atol=1e-6)
    np.testing.assert_allclose(results["loss"], value, rtol=1e-5)


def test_a_batch_in_which_nothing_counts_changes_nothing() -> None:
    bundle = cut(build_linear(), at="hidden", loss=Loss(ignore_index=-100), optimizer=SGD(lr=0.3))
    batch: Arrays = {"x": np.ones((4, 4), np.float32), "labels": np.full(4, -100, np.int64)}
    state, (results,) = train(bundle, [batch], 2)
    assert results["loss"] == 0
    np.testing.assert_array_equal(state["first"], bundle.client.weights["first"])


def test_a_model_of_a_fixed_batch_takes_a_step_of_several() -> None:
    model = build_linear()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    bundle = cut(model, at="hidden", optimizer=SGD(lr=0.3))
    free = cut(build_linear(), at="hidden", optimizer=SGD(lr=0.3))
    random = np.random.default_rng(1)
    data: Arrays = {
        "x": random.standard_normal((6, 4), np.float32),
        "labels": np.arange(6) % 3,
    }
    with connect(bundle) as (client, _), connect(free) as (other, _):
        history = client.fit(data, batch_size=6, accumulate=3, eval_data=data)
        expected = other.fit(data, batch_size=6)
        assert [record.samples for record in history.steps] == [6]
        assert history.steps[0].loss == pytest.approx(expected.steps[0].loss, rel=1e-6)
        with pytest.raises(UsageError, match="so 2 micro-batches have 4; use batch_size=4"):
            client.fit(data, batch_size=6, accumulate=2)


def test_a_loss_whose_weights_are_unknown_is_refused() -> None:
    model = build_linear()
    model.graph.node.append(helper.make_node("ReduceMean", ["scores"], ["own"], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("own", onnx.TensorProto.FLOAT, []))
    bundle = cut(model, at="hidden", loss="from-model", output="own", optimizer=SGD(lr=0.3))
    with (
        connect(bundle) as (client, _),
        pytest.raises(UsageError, match="cannot accumulate: its loss"),
    ):
        client.step({"x": np.ones((4, 4), np.float32)}, accumulate=2)


def test_private_labels_are_not_told_by_weights() -> None:
    loss = Loss(ignore_index=-100)
    chain = ZOO["chain"]
    tensors = list_cuts("chain")
    bundle = cut(chain.build(), at=tensors[0], tail_at=tensors[-1], loss=loss)
    with (
        connect(bundle) as (client, _),
        pytest.raises(UsageError, match="tell the server something"),
    ):
        client.step(chain.data(4), accumulate=2)


def test_losses_that_weigh_a_micro_batch_differently_are_refused() -> None:
    losses = [Loss(name="a"), Loss(name="b", ignore_index=-100, weight=0.5, labels="others")]
    bundle = cut(build_linear(), at="hidden", loss=losses, optimizer=SGD(lr=0.3))
    batch = {
        "x": np.ones((4, 4), np.float32),
        "labels": np.array([0, 1, 2, 0]),
        "others": np.array([0, -100, 1, 2]),
    }
    with connect(bundle) as (client, _):
        even = {**batch, "others": np.array([0, -100, -100, 2])}
        client.step(even, accumulate=2)
        with pytest.raises(
            UnusableData, match=r"counts 0\.5 of the batch in 'loss\.a', and 0\.333"
        ):
            client.step(batch, accumulate=2)


def test_a_bundle_of_an_earlier_version_trains_and_does_not_accumulate() -> None:
    bundle = cut(build_linear(), at=None, optimizer=SGD(lr=0.3))
    phases = [
        p for p in bundle.client.manifest.phases if p.name in ("train", "predict", "evaluate")
    ]
    manifest = msgspec.structs.replace(
        bundle.client.manifest, phases=tuple(phases), accumulators=()
    )
    old = PartyBundle(manifest=manifest, graphs=bundle.client.graphs, weights=bundle.client.weights)
    batch = {"x": np.ones((4, 4), np.float32), "labels": np.array([0, 1, 2, 0])}
    with Client(old, threads=1) as client:
        client.step(batch)
        with pytest.raises(UsageError, match="cut by an earlier version; cut the model again"):
            client.step(batch, accumulate=2)
