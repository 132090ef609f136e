from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from onnx import helper

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import (
    ArrayMismatch,
    InternalRuntimeError,
    LocalProtocolError,
    MissingArray,
    NormTooLarge,
    NotFinite,
    RemoteProtocolError,
    StageFailed,
    UsageError,
)
from splitonnx.manifests import KEY, LEARNING_RATE, STEP, Phase, Source, WireKind
from splitonnx.messages import TaskKey
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.tensors import TensorSpec
from tests.support import tiny
from tests.support.decodings import Decoding

ENGINE = Engine(threads=1)


def key(step: int = 0, phase: str = "train", micro_batch: int = 0) -> TaskKey:
    return TaskKey("s", phase, step, micro_batch)


def begin(executor: Executor, task: TaskKey, data: dict[str, np.ndarray] | None = None) -> None:
    executor.begin(task, data=data or {}, seed=5, learning_rate=tiny.RATE)


def exchange(
    client: Executor, server: Executor, task: TaskKey, data: dict[str, np.ndarray]
) -> None:
    """Open a task on both sides and pass wires to and fro until none is left."""
    begin(client, task, data)
    begin(server, task)
    waiting = [(client, server), (server, client)]
    while not (client.is_finished(task) and server.is_finished(task)):
        groups = [(there, g) for here, there in waiting for g in here.advance(task)]
        assert groups or client.is_finished(task)
        for there, group in groups:
            there.deliver(task, group)


def parties() -> tuple[Executor, Executor]:
    bundle = tiny.split_bundle()
    assert bundle.server is not None
    return Executor(bundle.client, ENGINE), Executor(bundle.server, ENGINE)


def test_a_split_step_is_the_step_that_numpy_takes() -> None:
    client, server = parties()
    reference = tiny.reference_state()
    for step in range(4):
        data = tiny.batch(step)
        exchange(client, server, key(step), data)
        assert server.finish(key(step)) == {}
        loss = client.finish(key(step))["loss"]
        np.testing.assert_allclose(loss, tiny.reference_step(reference, data), rtol=1e-5)
        assert client.step == server.step == step + 1
        for name, array in (client.state() | server.state()).items():
            np.testing.assert_allclose(array, reference[name], rtol=1e-4, atol=1e-6)


def test_split_and_whole_are_equal_bit_for_bit() -> None:
    client, server = parties()
    whole = Executor(tiny.local_bundle().client, ENGINE)
    for step in range(3):
        data = tiny.batch(step)
        exchange(client, server, key(step), data)
        begin(whole, key(step), data)
        assert list(whole.advance(key(step))) == []
        server.finish(key(step))
        assert client.finish(key(step))["loss"] == whole.finish(key(step))["loss"]
    split = client.state() | server.state()
    for name, array in whole.state().items():
        np.testing.assert_array_equal(split[name], array)


def test_predicting_leaves_the_state_and_the_step_alone() -> None:
    client, server = parties()
    task = key(7, "predict")
    data = tiny.batch(0)
    exchange(client, server, task, data)
    server.finish(task)
    expected = tiny.reference_predict(tiny.WEIGHTS, data["x"])
    np.testing.assert_allclose(client.finish(task)["y"], expected, rtol=1e-5)
    assert client.step == 0
    np.testing.assert_array_equal(client.state()["W1"], tiny.WEIGHTS["W1"])


def test_travelling_data_go_with_the_first_stage_s_wires() -> None:
    client, _ = parties()
    data = tiny.batch(0)
    begin(client, key(), data)
    groups = list(client.advance(key()))
    assert [list(group) for group in groups] == [["h", "labels"]]
    np.testing.assert_array_equal(groups[0]["labels"], data["labels"])


def test_wires_come_after_the_stage_that_makes_them_and_before_the_next_stage_runs() -> None:
    client, server = parties()
    begin(client, key(), tiny.batch(0))
    begin(server, key())
    (group,) = client.advance(key())
    server.deliver(key(), group)
    groups = server.advance(key())
    assert list(next(groups)) == ["h.grad", "loss"]
    assert not server.is_finished(key())  # body.update has not run
    assert list(groups) == []
    assert server.is_finished(key())


def test_data_alone_are_sent_where_no_stage_runs_first() -> None:
    wires = tuple(w for w in tiny.TRAIN_WIRES if w.tensor.name == "labels")
    phase = Phase(name="train", data=(tiny.spec("labels"),), wires=wires)
    client = Executor(tiny.make_party("client", (phase,), {}, {}), ENGINE)
    begin(client, key(), tiny.batch(0))
    assert [list(group) for group in client.advance(key())] == [["labels"]]
    assert client.is_finished(key())


def test_scalars_tell_seed_step_micro_batch_update_and_rate() -> None:
    names = {KEY: "key", STEP: "update", LEARNING_RATE: "rate"}
    stage = tiny.make_stage("echo", dict.fromkeys(names, Source.SCALAR), tuple(names.values()))
    nodes = [helper.make_node("Identity", [scalar], [name]) for scalar, name in names.items()]
    phase = Phase(name="predict", stages=(stage,), results=stage.outputs)
    executor = Executor(tiny.make_party("client", (phase,), {"echo": nodes}, {}), ENGINE)
    task = key(3, "predict", micro_batch=2)
    executor.begin(task, data={}, seed=11, learning_rate=0.25)
    list(executor.advance(task))
    results = executor.finish(task)
    assert {name: array.tolist() for name, array in results.items()} == {
        "key": [11, 3, 2],
        "update": 4,
        "rate": 0.25,
    }


def test_several_tasks_may_be_open_at_once() -> None:
    client, server = parties()
    tasks = [key(9, "predict", micro_batch=n) for n in range(2)]
    data = [tiny.batch(n) for n in range(2)]
    for task, arrays in zip(tasks, data, strict=True):
        begin(client, task, arrays)
        begin(server, task)
    for task in reversed(tasks):
        (group,) = client.advance(task)
        server.deliver(task, group)
    for task, arrays in zip(tasks, data, strict=True):
        (group,) = server.advance(task)
        client.deliver(task, group)
        expected = tiny.reference_predict(tiny.WEIGHTS, arrays["x"])
        np.testing.assert_allclose(client.finish(task)["y"], expected, rtol=1e-5)


def test_nothing_is_committed_before_finish_nor_ever_after_abandon() -> None:
    client, server = parties()
    exchange(client, server, key(), tiny.batch(0))
    before = client.state()["W1"]
    client.results(key())
    np.testing.assert_array_equal(before, tiny.WEIGHTS["W1"])
    client.abandon(key())
    with pytest.raises(LocalProtocolError, match="not open"):
        client.finish(key())
    assert client.step == 0
    np.testing.assert_array_equal(client.state()["W1"], tiny.WEIGHTS["W1"])
    begin(client, key(), tiny.batch(0))  # the same key serves again


def test_a_state_once_handed_out_does_not_change_with_training() -> None:
    client, server = parties()
    before = client.state()["W1"]
    exchange(client, server, key(), tiny.batch(0))
    client.finish(key())
    np.testing.assert_array_equal(before, tiny.WEIGHTS["W1"])
    assert not np.array_equal(client.state()["W1"], before)


def test_the_stash_is_freed_as_soon_as_nothing_needs_it() -> None:
    client, server = parties()
    data = tiny.batch(0)
    x = weakref.ref(data["x"])
    begin(client, key(), data)
    begin(server, key())
    (group,) = client.advance(key())
    server.deliver(key(), group)
    (answer,) = server.advance(key())
    del data
    gc.collect()
    assert x() is not None  # head.backward needs it
    client.deliver(key(), answer)
    list(client.advance(key()))
    gc.collect()
    assert x() is None
    client.finish(key())


def test_data_are_checked_before_anything_runs() -> None:
    client, _ = parties()
    data = tiny.batch(0)
    with pytest.raises(MissingArray, match="'labels'"):
        begin(client, key(), {"x": data["x"]})
    with pytest.raises(ArrayMismatch, match=r"'labels' should be F32\[N, 2\] where N = 6"):
        begin(client, key(), {"x": data["x"], "labels": data["labels"][:5]})
    begin(client, key(), data)


def test_wires_are_checked_against_their_declaration_and_the_batch() -> None:
    client, _ = parties()
    begin(client, key(), tiny.batch(0))
    list(client.advance(key()))
    with pytest.raises(RemoteProtocolError, match="'y'"):
        client.deliver(key(), {"y": np.zeros((6, 2), np.float32)})
    with pytest.raises(ArrayMismatch, match="N = 6"):
        client.deliver(key(), {"h.grad": np.zeros((5, 4), np.float32)})
    with pytest.raises(ArrayMismatch, match="F64"):
        client.deliver(key(), {"h.grad": np.zeros((6, 4))})
    client.deliver(key(), {"h.grad": np.zeros((6, 4), np.float32)})
    with pytest.raises(RemoteProtocolError, match=r"'h\.grad', not expected now"):
        client.deliver(key(), {"h.grad": np.zeros((6, 4), np.float32)})


def test_steps_are_taken_in_their_order_and_tasks_opened_and_closed_once() -> None:
    client, _ = parties()
    with pytest.raises(LocalProtocolError, match="step 1; the next is 0"):
        begin(client, key(1), tiny.batch(0))
    begin(client, key(), tiny.batch(0))
    with pytest.raises(LocalProtocolError, match="open already"):
        begin(client, key(), tiny.batch(0))
    with pytest.raises(LocalProtocolError, match="not finished"):
        client.finish(key())


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 1e39, -0.1])
def test_a_learning_rate_that_would_spoil_the_weights_is_refused(rate: float) -> None:
    client, _ = parties()
    with pytest.raises(UsageError, match="learning rate"):
        client.begin(key(), data=tiny.batch(0), seed=0, learning_rate=rate)


@pytest.mark.parametrize(("seed", "micro_batch"), [(-1, 0), (1 << 63, 0), (0, 1 << 64)])
def test_numbers_beyond_their_scalars_are_refused(seed: int, micro_batch: int) -> None:
    client, _ = parties()
    task = key(micro_batch=micro_batch)
    with pytest.raises(UsageError, match="seed, step and micro-batch"):
        client.begin(task, data=tiny.batch(0), seed=seed, learning_rate=tiny.RATE)


def test_a_failing_stage_is_named_and_the_state_stays() -> None:
    bundle = tiny.local_bundle().client
    weights = {**bundle.weights, "W2": np.zeros((5, 2), np.float32)}  # not as declared
    executor = Executor(replace(bundle, weights=weights), ENGINE)
    begin(executor, key(), tiny.batch(0))
    with pytest.raises(StageFailed, match=r"stage 'model\.step'"):
        list(executor.advance(key()))
    executor.abandon(key())
    assert executor.step == 0


def test_a_mistake_in_the_running_of_a_stage_is_ours_and_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = Executor(tiny.local_bundle().client, ENGINE)
    begin(executor, key(), tiny.batch(0))
    monkeypatch.setattr(ENGINE, "run", None)
    with pytest.raises(InternalRuntimeError, match=r"stage 'model\.step' failed \(TypeError: "):
        list(executor.advance(key()))


def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    tiny.local_bundle().save(tmp_path / "bundle")

    def train(executor: Executor, steps: range) -> None:
        for step in steps:
            begin(executor, key(step), tiny.batch(step))
            list(executor.advance(key(step)))
            executor.finish(key(step))

    first = Executor(Bundle.load(tmp_path / "bundle").client, ENGINE)
    train(first, range(2))
    first.publish()
    train(first, range(2, 4))
    second = Executor(PartyBundle.load(tmp_path / "bundle" / "client"), ENGINE)
    assert second.step == 2
    train(second, range(2, 4))
    for name, array in first.state().items():
        np.testing.assert_array_equal(second.state()[name], array)


def test_a_stage_may_decode_what_was_received() -> None:
    codes = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    plain = tiny.split_bundle().server
    assert plain is not None
    executor = Executor(plain, ENGINE)
    begin(executor, key())
    labels = tiny.batch(0)["labels"]
    executor.deliver(key(), {"h": codes * np.float32(10), "labels": labels})
    wanted = {name: a for group in executor.advance(key()) for name, a in group.items()}
    for name, array in Decoding.make().run(codes).items():
        np.testing.assert_array_equal(array, wanted[name])


def test_decoded_numbers_that_are_not_finite_are_refused_before_a_stage_reads_them() -> None:
    codes = np.full((6, 4), 1e38, np.float32)  # which is finite, and ten times it is not
    with pytest.raises(NotFinite, match=r"'h' holds NaN or infinity \(step 1\)"):
        Decoding.make().run(codes)


def test_the_norm_of_what_was_decoded_is_limited_if_it_is_a_gradient() -> None:
    codes = np.full((6, 4), 0.1, np.float32)  # whose norm is 0.49, and 4.9 decoded
    assert Decoding.make(WireKind.GRADIENT).run(codes, norm=5.0)
    assert Decoding.make().run(codes, norm=4.0)
    with pytest.raises(NormTooLarge, match=r"norm 4\.89898, over the limit of 4;"):
        Decoding.make(WireKind.GRADIENT).run(codes, norm=4.0)


def test_what_was_decoded_has_the_declared_shape() -> None:
    decoding = Decoding.make()
    phase = decoding.server.manifest.phase("train")
    (encoded,) = phase.list_encoded()
    wrong = msgspec.structs.replace(
        encoded, tensor=TensorSpec(name="h", dtype="F32", shape=("N", 5))
    )
    changed = msgspec.structs.replace(phase, encoded=(wrong,))
    phases = tuple(changed if p.name == "train" else p for p in decoding.server.manifest.phases)
    manifest = msgspec.structs.replace(decoding.server.manifest, phases=phases)
    with pytest.raises(ArrayMismatch, match="'h'"):
        Decoding(replace(decoding.server, manifest=manifest)).run(np.ones((6, 4), np.float32))
