"""The promise: split training equals unsplit training, wherever a model is cut."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from itertools import combinations

import numpy as np
import onnx
import onnxruntime
import pytest

from splitonnx import verifications
from splitonnx.bundles import Bundle
from splitonnx.names import TRAIN, Target
from splitonnx.optimizers import SGD, Adam, AdamW, Optimizer
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut, cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts as list_tensors
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.verifications import leave_whole, verify
from tests.support.oracles import sample_gradients, to_inference
from tests.support.recordings import RecordingTransport, check_explained, record_connections
from tests.support.wholes import share_wholes
from tests.support.zoo import ZOO

BATCH, STEPS = 8, 5


@cache
def prepare_zoo(name: str) -> PreparedModel:
    """Prepare a network of the zoo, once for all its cuts."""
    return prepare(open_model(ZOO[name].build()))


@cache
def list_cuts(name: str) -> tuple[str, ...]:
    return tuple(found.tensor for found in list_tensors(prepare_zoo(name), None))


VANILLA = [(name, tensor) for name in ZOO for tensor in list_cuts(name)]
U_SHAPED = [(name, *pair) for name in ZOO for pair in combinations(list_cuts(name), 2)]
SEVERAL = [name for name, entry in ZOO.items() if entry.several]


@pytest.fixture(autouse=True)
def wholes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build what all cuts of a network are compared with once a network."""
    share_wholes(monkeypatch)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[RecordingTransport]:
    """Record every connection that a verification makes."""
    return record_connections(monkeypatch, verifications)


@cache
def cut_zoo(name: str, at: str, tail: str | None = None) -> Bundle:
    """Cut a network of the zoo, once for all tests of the same place."""
    return cut_prepared(prepare_zoo(name), at=at, tail_at=tail or (), loss=ZOO[name].loss)


def count_kernels(bundle: Bundle) -> Counter[str]:
    """Count the operators of all training stages; ports are not kernels."""
    counts: Counter[str] = Counter()
    for party in bundle.parties.values():
        for stage in party.manifest.phase("train").stages:
            graph = onnx.load_from_string(party.graphs[stage.graph]).graph
            counts.update(node.op_type for node in graph.node if node.op_type != "Identity")
    return counts


def assert_equal_to_whole(name: str, bundle: Bundle) -> None:
    whole = leave_whole(bundle)
    verification = verify(bundle, ZOO[name].data(BATCH * STEPS), steps=STEPS, batch_size=BATCH)
    assert len(verification.steps) == STEPS
    differences = verification.steps[-1].differences
    trained = {s.tensor.name for s in whole.client.manifest.state if s.role in ("parameter",)}
    assert trained <= differences.keys()
    if _computing(count_kernels(bundle)) == _computing(count_kernels(whole)):
        assert verification.largest_difference == 0.0
    else:  # a cut through a pattern that the builder fuses in the whole model
        assert verification.largest_difference <= 1e-5


def _computing(counts: Counter[str]) -> Counter[str]:
    """Leave out constants and shapes, which parties may compute twice."""
    bookkeeping = ("Constant", "Shape", "Size", "Gather", "Unsqueeze", "Concat", "Cast")
    return Counter({kind: n for kind, n in counts.items() if kind not in bookkeeping})


@pytest.mark.parametrize(("name", "tensor"), VANILLA)
def test_a_vanilla_cut_trains_as_the_whole_model(
    name: str, tensor: str, recordings: list[RecordingTransport]
) -> None:
    bundle = cut_zoo(name, tensor)
    assert_equal_to_whole(name, bundle)
    (recording,) = recordings
    check_explained(bundle.client, recording, BATCH, {TRAIN: STEPS})


@pytest.mark.parametrize(("name", "first", "last"), U_SHAPED)
def test_a_u_shaped_cut_trains_as_the_whole_model(
    name: str, first: str, last: str, recordings: list[RecordingTransport]
) -> None:
    bundle = cut_zoo(name, first, last)
    assert_equal_to_whole(name, bundle)
    (recording,) = recordings
    check_explained(bundle.client, recording, BATCH, {TRAIN: STEPS})


@pytest.mark.parametrize("name", ZOO)
def test_labels_alone_may_stay_on_the_client(name: str) -> None:
    output = ZOO[name].build().graph.output[0].name
    bundle = cut_zoo(name, list_cuts(name)[0], output)
    assert_equal_to_whole(name, bundle)
    assert bundle.server is not None
    wires = bundle.server.manifest.phase("train").wires
    assert not [wire for wire in wires if "labels" in wire.tensor.name or wire.kind == "input"]


@pytest.mark.parametrize("name", SEVERAL)
def test_a_cut_of_several_tensors_trains_as_the_whole_model(name: str) -> None:
    entry = ZOO[name]
    bundle = cut_prepared(prepare_zoo(name), at=entry.several, loss=entry.loss)
    assert_equal_to_whole(name, bundle)


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(lr=0.1),
        SGD(lr=0.1, momentum=0.9, weight_decay=1e-2),
        Adam(lr=1e-2, weight_decay=1e-2),
        AdamW(lr=1e-2, weight_decay=0.1),
        AdamW(lr=1e-2, clip_norm=0.05),
        SGD(lr=0.1, clip_norm=0.05),
    ],
)
def test_every_optimizer_steps_as_on_the_whole_model(optimizer: Optimizer) -> None:
    for tail in ((), "pool"):
        bundle = cut_prepared(prepare_zoo("dropout"), at="d1", tail_at=tail, optimizer=optimizer)
        data = ZOO["dropout"].data(BATCH * STEPS)
        assert verify(bundle, data, batch_size=BATCH).largest_difference == 0.0


@pytest.mark.parametrize("name", [name for name in ZOO if name != "dropout"])
def test_gradients_are_those_of_an_independent_oracle(name: str) -> None:
    entry = ZOO[name]
    model, data = entry.build(), entry.data(BATCH)
    whole = cut_prepared(prepare_zoo(name), at=None, loss=entry.loss)
    parameters = [s.tensor.name for s in whole.client.manifest.state if s.role == "parameter"]
    step = onnxruntime.InferenceSession(whole.client.graphs["model.step.onnx"])
    names = [value.name for value in step.get_outputs()]
    feeds = {**whole.client.weights, **data}
    wanted = {value.name for value in step.get_inputs()}
    results = step.run(None, {n: a for n, a in feeds.items() if n in wanted})
    found = dict(zip(names, results, strict=True))
    checked = 0
    for parameter, index, expected in sample_gradients(model, entry.loss, data, parameters):
        gradient = found[f"{parameter}_grad"]
        scale = float(np.abs(gradient).max())
        assert abs(float(gradient[index]) - expected) <= 1e-3 * scale + 1e-7, (parameter, index)
        checked += 1
    assert checked >= 8 * len(parameters) / 2


@pytest.mark.parametrize(("name", "tensor"), VANILLA)
def test_parts_joined_again_are_the_original_model(name: str, tensor: str) -> None:
    entry = ZOO[name]
    model, data = entry.build(), entry.data(BATCH)
    inputs = {key: data[key] for key in entry.inputs}
    original = onnxruntime.InferenceSession(to_inference(model).SerializeToString())
    expected = original.run(None, inputs)[0]
    for tail in (None, model.graph.output[0].name):
        bundle = cut_zoo(name, tensor, tail)
        merged = onnxruntime.InferenceSession(merge(bundle))
        assert [v.name for v in merged.get_inputs()] == [v.name for v in original.get_inputs()]
        np.testing.assert_allclose(merged.run(None, inputs)[0], expected, rtol=1e-5, atol=1e-6)
        assert bundle.server is not None
        link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
        with Client(bundle.client, link, threads=1) as client:
            (predicted,) = client.predict(inputs).values()
        np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-6)


def test_the_server_holds_nothing_of_head_and_tail() -> None:
    bundle = cut(ZOO["dropout"].build(), at="d1", tail_at="pool")
    assert bundle.server is not None
    assert set(bundle.server.weights) == {
        "w2", "n2.bn.scale", "n2.bn.bias", "n2.bn.mean", "n2.bn.var",
    }  # fmt: skip
    assert not set(bundle.server.weights) & set(bundle.client.weights)


@pytest.mark.parametrize(("name", "tensor"), VANILLA)
def test_the_raw_input_does_not_cross(name: str, tensor: str) -> None:
    wires = cut_zoo(name, tensor).client.manifest.phase("train").wires
    assert not {w.tensor.name for w in wires} & {f"{data}@server" for data in ZOO[name].inputs}


def build_with_more_outputs() -> onnx.ModelProto:
    """The chain with an output of the head, and one that reads weights alone."""
    model = ZOO["chain"].build()
    lonely = onnx.numpy_helper.from_array(np.array([1.0, -2.0], np.float32), "lonely")
    model.graph.initializer.append(lonely)
    model.graph.node.append(onnx.helper.make_node("Abs", ["lonely"], ["constant"], name="abs"))
    more: dict[str, list[int | str]] = {"act0": ["N", 8], "constant": [2]}
    for name, dims in more.items():
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)
        model.graph.output.append(value)
    return model


@pytest.mark.parametrize(("at", "tail"), [("act1", ()), ("act0", ()), ("act0", "act2")])
def test_outputs_beside_the_trained_one_are_predicted_and_merged(at: str, tail: str) -> None:
    model, data = build_with_more_outputs(), ZOO["chain"].data(16)
    original = onnxruntime.InferenceSession(model.SerializeToString())
    names = [value.name for value in original.get_outputs()]
    expected = dict(zip(names, original.run(None, {"x": data["x"]}), strict=True))
    bundle = cut(model, at=at, tail_at=tail)
    assert verify(bundle, data, batch_size=8).largest_difference == 0.0
    merged = onnxruntime.InferenceSession(merge(bundle))
    assert [value.name for value in merged.get_outputs()] == names
    assert [value.name for value in merged.get_inputs()] == ["x"]
    for name, array in zip(names, merged.run(None, {"x": data["x"]}), strict=True):
        np.testing.assert_allclose(array, expected[name], rtol=1e-6)
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        predicted = client.predict({"x": data["x"]})
    assert set(predicted) == {"linear4", "act0"}
    for name, array in predicted.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", [(), "act2"])
def test_the_raw_input_crosses_where_it_is_named(tail: str) -> None:
    bundle = cut(ZOO["chain"].build(), at="x", tail_at=tail)
    assert verify(bundle, ZOO["chain"].data(16), batch_size=8).largest_difference == 0.0


def test_a_skip_from_head_to_tail_stays_on_the_client() -> None:
    bundle = cut(ZOO["residual"].build(), at="m2", tail_at="m3")
    assert_equal_to_whole("residual", bundle)
    wires = {wire.tensor.name for wire in bundle.client.manifest.phase("train").wires}
    assert wires == {"m2@server", "m3@client", "m2@server_grad", "m3@client_grad"}


def test_frozen_parameters_keep_their_value() -> None:
    data = ZOO["dropout"].data(BATCH * STEPS)
    for frozen in (["w1"], ["w2", r"n2\.bn"], ["w3", "b3"], ["w1", "n1"]):
        bundle = cut(ZOO["dropout"].build(), at="d1", tail_at="pool", freeze=frozen)
        assert verify(bundle, data, batch_size=BATCH).largest_difference == 0.0
        states = [s for p in bundle.parties.values() for s in p.manifest.state]
        kept = {s.tensor.name for s in states if s.role == "frozen"}
        assert kept == {
            s.tensor.name for s in states
            if any(re.search(f, s.tensor.name) for f in frozen)
            and s.role not in ("buffer", "optimizer")
        }  # fmt: skip
        assert kept


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("targets", [("portable", "training"), ("training", "portable")])
def test_parties_with_different_kernels_stay_within_rounding(
    name: str, targets: tuple[Target, Target]
) -> None:
    entry, cuts = ZOO[name], list_cuts(name)
    for at, tail in ((cuts[len(cuts) // 2], ()), (cuts[0], cuts[-1])):
        bundle = cut_prepared(
            prepare_zoo(name),
            at=at,
            tail_at=tail,
            loss=entry.loss,
            client_target=targets[0],
            server_target=targets[1],
        )
        verification = verify(bundle, entry.data(BATCH * STEPS), batch_size=BATCH)
        assert verification.largest_difference <= 1e-5
