"""States that a model hands itself: held against onnx's evaluator, with the state fed by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import splitonnx
from splitonnx.errors import KeptArray
from splitonnx.manifests import Role
from splitonnx.names import TARGETS, Target
from splitonnx.optimizers import SGD
from splitonnx.partitioner.cutting.carried_states.declarations import list_pairs
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import StepRecord
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.runtime.server.servers import Server
from splitonnx.verifications import verify
from tests.support.carried import (
    AVERAGES,
    BATCH,
    RECURRENT,
    build_averages,
    build_fed_back,
    build_lstm,
    build_recurrent,
    build_replaced,
    draw_data,
)
from tests.support.oracles import make_evaluator, sample_gradients

RATE = 0.125
STEPS = 4
RECURRENT_CUTS: list[tuple[str | None, tuple[str, ...], str]] = [
    (None, (), "client"),
    ("h", (), "client"),
    ("z", ("p",), "client"),
    ("a", (), "server"),
    ("a", ("z",), "server"),
    ("x", ("h",), "server"),
]


def cut_recurrent(
    at: str | None, tail_at: tuple[str, ...] = (), target: Target = "training", **options: Any
) -> splitonnx.Bundle:
    model = build_recurrent(options.pop("initial", None))
    return cut_carried(model, RECURRENT, at, tail_at, target, **options)


def cut_carried(
    model: onnx.ModelProto,
    states: Mapping[str, str],
    at: str | None,
    tail_at: tuple[str, ...],
    target: Target,
    **options: Any,
) -> splitonnx.Bundle:
    return cut(
        model,
        at=at,
        tail_at=tail_at,
        loss="mse",
        optimizer=SGD(lr=RATE),
        dims={"N": BATCH},
        states=states,
        client_target=target,
        server_target=target,
        **options,
    )


def cut_averages(at: str | None, tail_at: tuple[str, ...] = ()) -> splitonnx.Bundle:
    return cut(
        build_averages(),
        at=at,
        tail_at=tail_at,
        loss="mse",
        optimizer=SGD(lr=RATE),
        states=AVERAGES,
    )


def list_steps(sizes: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    data, ends = draw_data(sum(sizes)), np.cumsum(sizes)
    return [
        {name: array[end - size : end] for name, array in data.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]


def read_states(bundle: splitonnx.Bundle) -> dict[str, dict[str, np.ndarray]]:
    """Map each party to the initial values of its buffers."""
    return {
        name: {
            spec.tensor.name: party.weights[spec.tensor.name]
            for spec in party.manifest.state
            if spec.role is Role.BUFFER
        }
        for name, party in bundle.parties.items()
    }


def hold(
    bundle: splitonnx.Bundle,
    model: onnx.ModelProto,
    states: Mapping[str, str] | list[tuple[str, str]],
    batches: list[dict[str, np.ndarray]],
) -> None:
    """Hold every step's state and gradients against the model, run by onnx's own evaluator."""
    carried = {name: array for kept in read_states(bundle).values() for name, array in kept.items()}
    pairs = list_pairs(states)
    assert carried.keys() == {source for _, source in pairs}
    stored, link = list(model.graph.initializer), None
    if bundle.server is not None:
        link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        for batch in batches:
            before = read_all(client, link)
            evaluator = make_evaluator(put_weights(model, before))
            given = {"x": batch["x"], **carried}
            made = evaluator.run(None, given)
            assert isinstance(made, list)
            results = dict(zip(evaluator.output_names, map(np.asarray, made), strict=True))
            expected = list(
                sample_gradients(
                    put_weights(model, before),
                    "mse",
                    {**given, "labels": batch["labels"]},
                    [t.name for t in stored if len(t.dims) > 1 or t.name == "decay"],
                    entries=4,
                )
            )
            client.step(batch)
            if link is not None:
                link.drain()
            after = read_all(client, link)
            for output, source in pairs:
                np.testing.assert_allclose(after[source], results[output], rtol=1e-6, atol=1e-7)
            for name, index, slope in expected:
                change = (before[name][index] - after[name][index]) / RATE
                assert abs(float(change) - slope) < 2e-5, (name, index)
            carried = {source: results[output] for output, source in pairs}


def read_all(client: Client, link: Any) -> dict[str, np.ndarray]:
    return {**client.state(), **({} if link is None else link.executor.state())}


def put_weights(model: onnx.ModelProto, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for tensor in copied.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return copied


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("at", "tail_at", "owner"), RECURRENT_CUTS)
def test_a_hidden_state_is_carried_by_the_party_that_computes_it(
    at: str | None, tail_at: tuple[str, ...], owner: str, target: Target
) -> None:
    bundle = cut_recurrent(at, tail_at, target)
    kept = read_states(bundle)
    assert {party: set(states) for party, states in kept.items() if states} == {owner: {"h_in"}}
    assert not kept[owner]["h_in"].any()
    hold(bundle, build_recurrent(), RECURRENT, list_steps((BATCH,) * STEPS))


@pytest.mark.parametrize(("at", "tail_at"), [(None, ()), ("z", ()), ("h", ("z",)), ("m", ("h",))])
def test_states_without_a_batch_take_batches_of_any_size(
    at: str | None, tail_at: tuple[str, ...]
) -> None:
    hold(cut_averages(at, tail_at), build_averages(), AVERAGES, list_steps((4, 7, 1, 3)))


@pytest.mark.parametrize("at", [None, "rows", "last"])
def test_the_states_of_an_lstm_are_carried(at: str | None) -> None:
    states = {"hn": "h0", "cn": "c0"}
    bundle = cut(
        build_lstm(),
        at=at,
        loss="mse",
        optimizer=SGD(lr=RATE),
        dims={"N": BATCH},
        states=states,
    )
    batches = list_steps((BATCH,) * STEPS)
    wide = np.random.default_rng(1).standard_normal((STEPS, BATCH, 3, 3), np.float32)
    batches = [{**batch, "x": x} for batch, x in zip(batches, wide, strict=True)]
    hold(bundle, build_lstm(), states, batches)


@pytest.mark.parametrize("at", [None, "a"])
def test_a_prediction_may_be_carried_and_to_several_inputs(at: str | None) -> None:
    pairs = [("y", "before"), ("y", "again")]
    bundle = cut(
        build_fed_back(), at=at, loss="mse", optimizer=SGD(lr=RATE), dims={"N": BATCH}, states=pairs
    )
    assert [spec.name for spec in bundle.client.manifest.outputs] == ["y"]
    hold(bundle, build_fed_back(), pairs, list_steps((BATCH,) * STEPS))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("at", "tail_at", "owner"),
    [(None, (), "client"), ("h", (), "server"), ("h", ("t",), "server"), ("s", (), "client")],
)
@pytest.mark.parametrize("kind", ["stored", "sizes", "sum"])
def test_a_state_that_no_data_change_is_replaced_after_each_step(
    kind: str, at: str | None, tail_at: tuple[str, ...], owner: str, target: Target
) -> None:
    states = {"new": "old"}
    bundle = cut_carried(build_replaced(kind), states, at, tail_at, target)
    assert "old" in read_states(bundle)[owner]
    hold(bundle, build_replaced(kind), states, list_steps((BATCH,) * 2))


def test_a_state_in_float16_keeps_its_type() -> None:
    model = build_recurrent()
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    bundle = cut(model, at="a", loss="mse", dims={"N": BATCH}, states=RECURRENT)
    assert bundle.server is not None
    assert bundle.server.weights["h_in"].dtype == np.float16
    data = draw_data(8)
    data["x"] = data["x"].astype(np.float16)
    assert verify(bundle, data, steps=2, batch_size=BATCH).largest_difference == 0


def test_two_parties_may_each_keep_a_state() -> None:
    kept = read_states(cut_averages("z"))
    assert {party: set(states) for party, states in kept.items()} == {
        "client": {"mean_in"},
        "server": {"count_in"},
    }


def test_a_state_starts_at_the_value_that_the_file_stores() -> None:
    initial = np.random.default_rng(2).standard_normal((BATCH, 5), np.float32)
    model = build_recurrent()
    for at in (None, "h", "a"):
        bundle = cut_recurrent(at, initial=initial)
        (states,) = [states for states in read_states(bundle).values() if states]
        np.testing.assert_array_equal(states["h_in"], initial)
        hold(bundle, model, RECURRENT, list_steps((BATCH,) * 2))


@pytest.mark.parametrize(("at", "tail_at", "owner"), RECURRENT_CUTS[1:])
def test_split_training_with_a_state_equals_unsplit_training(
    at: str, tail_at: tuple[str, ...], owner: str
) -> None:
    found = verify(cut_recurrent(at, tail_at), draw_data(16), steps=4, batch_size=BATCH)
    assert "h_in" in found.steps[0].differences
    assert found.largest_difference == 0
    assert verify(cut_averages("z"), draw_data(16), steps=4, batch_size=5).largest_difference == 0


def test_a_prediction_reads_the_state_and_leaves_it() -> None:
    bundle = cut_recurrent(None)
    model, batches = build_recurrent(), list_steps((BATCH,) * 2)
    with Client(bundle.client, None, threads=1) as client:
        client.step(batches[0])
        state = dict(client.state())
        expected = make_evaluator(put_weights(model, state)).run(
            None, {"x": batches[1]["x"], "h_in": state["h_in"]}
        )
        assert isinstance(expected, list)
        for _ in range(2):
            predicted = client.predict({"x": batches[1]["x"]}, batch_size=BATCH)
            assert predicted.keys() == {"y"}
            np.testing.assert_allclose(predicted["y"], expected[0], rtol=1e-5, atol=1e-6)
        client.evaluate(batches[1], batch_size=BATCH)
        np.testing.assert_array_equal(client.state()["h_in"], state["h_in"])
        assert state["h_in"].any()


def fit(client: Client, stop_after: int | None = None) -> None:
    def stop(record: StepRecord) -> None:
        if record.step == stop_after:
            raise KeyboardInterrupt

    client.fit(draw_data(20), epochs=2, batch_size=BATCH, checkpoint_every=2, on_step=stop)


@pytest.mark.parametrize("at", ["a", "h"])
def test_a_run_that_resumes_has_the_states_of_its_checkpoint(at: str, tmp_path: Path) -> None:
    outcomes = []
    for stop_after in (None, 5):
        folder = tmp_path / str(stop_after)
        cut_recurrent(at).save(folder)
        with Server(folder / "server", port=0, threads=1) as server:
            if stop_after is not None:
                with pytest.raises(KeyboardInterrupt):
                    fit(Client(folder / "client", server.url, threads=1), stop_after)
            is_resumed = stop_after is not None
            with Client(folder / "client", server.url, threads=1, resume=is_resumed) as client:
                fit(client)
                client.save()
        bundle = splitonnx.Bundle.load(folder)
        outcomes.append(
            {n: a for party in bundle.parties.values() for n, a in party.state().items()}
        )
    assert outcomes[0]["h_in"].any()
    for name, array in outcomes[0].items():
        np.testing.assert_array_equal(outcomes[1][name], array)


@pytest.mark.parametrize("at", [None, "a"], ids=["client", "server"])
def test_data_that_hold_a_state_are_refused_whoever_keeps_it(at: str | None) -> None:
    """The state would not begin with them, and a prediction would not read them."""
    bundle, (name,) = cut_recurrent(at), RECURRENT.values()
    keeper = bundle.client if bundle.server is None else bundle.server
    batch = {**draw_data(BATCH), name: np.ones_like(keeper.weights[name])}
    link = None
    if bundle.server is not None:
        assert bundle.client.manifest.remote_states == (name,)
        assert bundle.server.manifest.remote_states == ()
        link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        calls: list[Callable[[], object]] = [
            lambda: client.fit([batch]),
            lambda: client.step(batch),
            lambda: client.evaluate([batch]),
            lambda: client.predict([batch]),
        ]
        for call in calls:
            with pytest.raises(KeptArray, match=f"'{name}'.*leave it out of the data"):
                call()
    with pytest.raises(KeptArray):
        verify(bundle, [batch], steps=1)
