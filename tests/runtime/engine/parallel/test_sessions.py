"""A stage whose parts run on other threads computes what it does as a whole, and ends at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from splitonnx import verifications
from splitonnx.bundles import PartyBundle
from splitonnx.errors import StageFailed, StageStopped
from splitonnx.names import TRAIN
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine, LoadedStage, Tensor
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.engine.parallel import divisions
from splitonnx.runtime.engine.parallel.sessions import ParallelSession
from splitonnx.verifications import leave_whole, verify
from tests.runtime.engine.parallel.test_divisions import SHAPES, write_graph
from tests.support.zoo import ZOO


def draw(engine: Engine, samples: int = 3) -> dict[str, Tensor]:
    random = np.random.default_rng(0)
    shapes = {n: [samples if d == "N" else int(d) for d in shape] for n, shape in SHAPES.items()}
    arrays = {n: random.standard_normal(shape, np.float32) for n, shape in shapes.items()}
    return {name: engine.from_array(array) for name, array in arrays.items()}


def load(threads: int = 2) -> tuple[Engine, LoadedStage]:
    engine = Engine(threads=threads)
    return engine, engine.load("body", write_graph(), training=True)


def run(engine: Engine, stage: LoadedStage, feeds: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: engine.to_array(value) for name, value in engine.run(stage, feeds).items()}


def differentiate_weights(gradient: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Compute the gradient of the weights of a convolution of 3 x 3 points in float64."""
    padded = np.pad(image.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    found: np.ndarray = np.einsum("nohw,nihwab->oiab", gradient.astype(np.float64), windows)
    return found


@pytest.mark.parametrize("threads", [2, 3])
def test_a_divided_stage_computes_the_gradients(threads: int) -> None:
    engine, stage = load(threads)
    assert isinstance(stage.session, ParallelSession)
    feeds = draw(engine)
    found = run(engine, stage, feeds)
    dy, x = engine.to_array(feeds["dy"]), engine.to_array(feeds["x"])
    expected = differentiate_weights(dy, np.maximum(x, 0))
    np.testing.assert_allclose(found["w_grad"], expected, rtol=1e-4, atol=1e-4)
    alone, whole = load(threads=1)
    assert not isinstance(whole.session, ParallelSession)
    others = run(alone, whole, feeds)
    assert found.keys() == others.keys()
    for name, array in others.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-4)


def test_a_divided_stage_names_its_outputs_and_their_types() -> None:
    _, stage = load()
    _, whole = load(threads=1)
    expected = [(output.name, output.type) for output in whole.session.get_outputs()]
    assert [(output.name, output.type) for output in stage.session.get_outputs()] == expected


def test_each_run_has_the_same_bits() -> None:
    engine, stage = load()
    feeds = draw(engine)
    first = {name: array.tobytes() for name, array in run(engine, stage, feeds).items()}
    for _ in range(20):
        again = {name: array.tobytes() for name, array in run(engine, stage, feeds).items()}
        assert again == first


def test_batches_of_other_sizes_follow_each_other() -> None:
    engine, stage = load()
    alone, whole = load(threads=1)
    for samples in (1, 5, 2):
        feeds = draw(engine, samples)
        expected = run(alone, whole, feeds)
        for name, array in run(engine, stage, feeds).items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-4)


def test_only_the_outputs_that_are_asked_for_are_computed() -> None:
    engine, stage = load()
    feeds = draw(engine)
    (found,) = run(engine, replace(stage, outputs=("v_grad",)), feeds).values()
    assert found.tobytes() == run(engine, stage, feeds)["v_grad"].tobytes()


def test_several_threads_may_run_a_stage_at_a_time() -> None:
    engine, stage = load()
    feeds = [draw(engine, samples) for samples in (1, 2, 3, 4)]
    expected = [run(engine, stage, own)["w_grad"].tobytes() for own in feeds]
    found: dict[int, bytes] = {}

    def work(index: int) -> None:
        found[index] = run(engine, stage, feeds[index])["w_grad"].tobytes()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(feeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(feeds))] == expected


def test_an_input_that_is_missing_fails_the_stage() -> None:
    engine, stage = load()
    feeds = draw(engine)
    del feeds["w"]
    with pytest.raises(StageFailed, match="'w' is missing"):
        engine.run(stage, feeds)


class Acting:
    """A session in whose place a function runs."""

    def __init__(self, act: Callable[[Any], object]) -> None:
        self._act = act

    def run_with_ort_values(
        self, names: Sequence[str], feeds: Mapping[str, Any], options: Any
    ) -> list[Any]:
        self._act(options)
        raise RuntimeError("ended")


def replace_parts(stage: LoadedStage, act: Callable[[Any], object]) -> None:
    session = stage.session
    session._parts = [replace(part, session=Acting(act)) for part in session._parts]


def list_helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "splitonnx-parts"]


def test_a_part_that_fails_ends_the_stage_with_its_error() -> None:
    engine, stage = load()

    def fail(options: Any) -> None:
        raise RuntimeError("no memory")

    replace_parts(stage, fail)
    with pytest.raises(StageFailed, match="no memory"):
        engine.run(stage, draw(engine))
    assert not list_helpers()


def test_a_part_that_fails_ends_the_others() -> None:
    engine, stage = load()
    begun, ended = threading.Event(), threading.Event()

    def wait(options: Any) -> None:
        begun.set()
        while not options.terminate:
            pass
        ended.set()

    def fail(options: Any) -> None:
        begun.wait()
        raise RuntimeError("no memory")

    replace_parts(stage, wait)
    parts = stage.session._parts
    parts[0] = replace(parts[0], session=Acting(fail))
    with pytest.raises(StageFailed, match="no memory"):
        engine.run(stage, draw(engine))
    assert ended.is_set()
    assert not list_helpers()


def test_a_trunk_that_fails_ends_the_stage_before_its_parts() -> None:
    engine, stage = load()
    ran: list[Any] = []

    def fail(options: Any) -> None:
        raise RuntimeError("no memory")

    replace_parts(stage, ran.append)
    stage.session._trunk = replace(stage.session._trunk, session=Acting(fail))
    with pytest.raises(StageFailed, match="no memory"):
        engine.run(stage, draw(engine))
    assert not ran


def test_stopping_an_engine_ends_parts_that_run() -> None:
    engine, stage = load()
    begun = threading.Event()

    def wait(options: Any) -> None:
        begun.set()
        while not options.terminate:
            pass

    replace_parts(stage, wait)
    failures: list[Exception] = []

    def work() -> None:
        try:
            engine.run(stage, draw(engine))
        except StageStopped as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    engine.stop()
    thread.join()
    assert len(failures) == 1
    assert not list_helpers()


def train_with_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have verifications train with two threads, and divide small stages, too."""

    def open_client(party: PartyBundle, link: Any, *, threads: int, seed: int) -> Client:
        return Client(party, link, threads=threads + 1, seed=seed)

    monkeypatch.setattr(divisions, "LEAST", 1)
    monkeypatch.setattr(verifications, "Client", open_client)
    monkeypatch.setattr(verifications, "Engine", lambda threads: Engine(threads=threads + 1))


@pytest.mark.parametrize("name", ["convolutions", "dropout", "wide_convolutions"])
def test_every_cut_trains_as_the_whole_model_with_two_threads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_with_two_threads(monkeypatch)
    model = prepare(open_model(ZOO[name].build()))
    places = [found.tensor for found in list_cuts(model, None)]
    cuts = [(at, ()) for at in places] + [(places[0], tail) for tail in places[1:]]
    for at, tail in cuts:
        bundle = cut_prepared(model, at=at, tail_at=tail, loss=ZOO[name].loss)
        verification = verify(bundle, ZOO[name].data(16), steps=2, batch_size=8)
        assert verification.largest_difference == 0.0
    whole = Executor(leave_whole(bundle).client, Engine(threads=2))
    whole.prepare(TRAIN)
    sessions = [stage.session for stage in whole._loaded.values()]
    assert any(isinstance(session, ParallelSession) for session in sessions)
