"""A step of several micro-batches is kept beside the state until it ends."""

from __future__ import annotations

import weakref

import msgspec
import numpy as np
import pytest

from splitonnx.errors import LocalProtocolError, UsageError
from splitonnx.manifests import PartyManifest, Phase, Source, Stage, StageInput
from splitonnx.messages import TaskKey
from splitonnx.runtime.engine.dataflows import Dataflow
from splitonnx.runtime.engine.engines import Engine, Tensor
from splitonnx.runtime.engine.steps import OpenStep, OpenTask, make_scalars
from splitonnx.tensors import TensorSpec
from tests.support import tiny


def name_task(phase: str, step: int = 0, micro_batch: int = 0) -> TaskKey:
    return TaskKey("a" * 32, phase, step, micro_batch)


@pytest.fixture
def engine() -> Engine:
    return Engine(threads=1)


SUM, ADDED = "w0#gradient", "w0#gradient/new"
ADDER = Stage(
    name="accumulate",
    graph="accumulate.onnx",
    inputs=(StageInput(name=SUM, source=Source.STATE),),
    outputs=(ADDED,),
)


def build_manifest(**commits: str) -> PartyManifest:
    """Declare a party that accumulates the sum of one gradient, and ``commits`` beside it."""
    reader = Stage(name="gradients", graph="", inputs=ADDER.inputs, outputs=())
    phases = (
        Phase(name="accumulate", stages=(ADDER,), commits={SUM: ADDED, **commits}),
        Phase(name="update", stages=(reader,)),
    )
    return PartyManifest(
        format="", party="server", digest="", target="portable", phases=phases, state=(), files={},
        learning_rate=0.1, accumulators=(TensorSpec(name=SUM, dtype="F32", shape=(3,)),),
    )  # fmt: skip


@pytest.fixture
def step(engine: Engine) -> OpenStep:
    return OpenStep(build_manifest(statistic="new statistic"), engine)


def make(engine: Engine, value: float) -> Tensor:
    return engine.from_array(np.full(3, value, np.float32))


def test_sums_begin_at_zero_and_are_no_part_of_the_state(step: OpenStep, engine: Engine) -> None:
    before = {"w0": make(engine, 1), "statistic": make(engine, 5)}
    first, update = name_task("accumulate"), name_task("update", micro_batch=1)
    step.begin(first)
    assert not engine.to_array(step.read(before, first, SUM)).any()
    assert step.read(before, first, "statistic") is before["statistic"]
    added, changed = make(engine, 2), make(engine, 6)
    step.add(first, {ADDED: added, "new statistic": changed})
    step.end(first)
    step.begin(update)
    assert step.read(before, update, SUM) is added
    assert step.read(before, update, "statistic") is changed
    assert set(before) == {"w0", "statistic"}
    assert step.close() == {"statistic": changed}
    assert step.micro_batches == 0
    step.begin(first)
    assert not engine.to_array(step.read(before, first, SUM)).any()


def test_only_sums_that_nothing_was_added_to_are_zero(step: OpenStep, engine: Engine) -> None:
    first, second = (name_task("accumulate", micro_batch=number) for number in range(2))
    for task in (first, second):
        step.begin(task)
    assert step.is_zero(first, SUM)
    assert not step.is_zero(first, "statistic")
    step.add(first, {ADDED: make(engine, 1)})
    assert not step.is_zero(second, SUM)
    step.reset()
    step.begin(first)
    assert step.is_zero(first, SUM)


def test_a_micro_batch_waits_for_what_the_one_before_it_adds(
    step: OpenStep, engine: Engine
) -> None:
    tasks = [name_task("accumulate", micro_batch=number) for number in range(3)]
    for task in tasks:
        step.begin(task)
    assert [step.is_ready(task, ADDER) for task in tasks] == [True, False, False]
    made = [make(engine, number) for number in range(3)]
    for number, task in enumerate(tasks):
        assert step.is_ready(task, ADDER)
        if number:
            assert step.read({}, task, SUM) is made[number - 1]
        step.add(task, {ADDED: made[number]})
        step.note_run(task, ADDER)


def test_an_update_waits_until_every_micro_batch_is_finished(
    step: OpenStep, engine: Engine
) -> None:
    tasks = [name_task("accumulate", micro_batch=number) for number in range(2)]
    update = name_task("update", micro_batch=2)
    for task in (*tasks, update):
        step.begin(task)
    for task in tasks:
        step.add(task, {ADDED: make(engine, 1)})
        assert not step.is_ready(update, ADDER)
        step.end(task)
    assert step.is_ready(update, ADDER)


def test_sums_are_freed_when_nothing_reads_them_any_more(step: OpenStep, engine: Engine) -> None:
    reader = build_manifest().phase("update").stages[0]
    sums = [np.full(3, number, np.float32) for number in range(2)]
    seen = [weakref.ref(array) for array in sums]
    for number in range(2):
        task = name_task("accumulate", micro_batch=number)
        step.begin(task)
        step.add(task, {ADDED: engine.from_array(sums.pop(0))})
        assert seen[number]() is not None
        step.note_run(task, ADDER)
        step.end(task)
    assert [ref() is None for ref in seen] == [True, False]
    update = name_task("update", micro_batch=2)
    step.begin(update)
    step.note_run(update, reader)
    assert seen[1]() is None


def test_an_abandoned_step_leaves_nothing(step: OpenStep, engine: Engine) -> None:
    step.begin(name_task("accumulate"))
    step.add(name_task("accumulate"), {"new statistic": make(engine, 1)})
    step.end(name_task("accumulate"))
    step.reset()
    assert step.close() == {}
    step.check_next(name_task("accumulate"), 0)


@pytest.mark.parametrize(
    ("done", "phase", "number", "message"),
    [
        (1, "accumulate", 0, "1 were begun"),
        (0, "accumulate", 1, "0 were begun"),
        (2, "update", 1, "2 were begun"),
        (0, "update", 0, "nothing was accumulated"),
        (1, "train", 0, "1 were begun"),
    ],
)
@pytest.mark.parametrize("ends", [True, False])
def test_a_micro_batch_is_neither_left_out_nor_doubled(
    step: OpenStep, done: int, phase: str, number: int, message: str, ends: bool
) -> None:
    for micro_batch in range(done):
        task = name_task("accumulate", micro_batch=micro_batch)
        step.begin(task)
        if ends:
            step.end(task)
    with pytest.raises(LocalProtocolError, match=message):
        step.check_next(name_task(phase, micro_batch=number), 0)


def test_tasks_of_the_step_follow_each_other(step: OpenStep) -> None:
    for number in range(2):
        task = name_task("accumulate", micro_batch=number)
        step.check_next(task, 0)
        step.begin(task)
    step.check_next(name_task("predict", 7), 0)  # it belongs to no step
    update = name_task("update", micro_batch=2)
    step.check_next(update, 0)
    with pytest.raises(LocalProtocolError, match="at step 1; the next is 0"):
        step.check_next(name_task("update", 1, 2), 0)
    step.begin(update)
    with pytest.raises(LocalProtocolError, match="which is being updated"):
        step.check_next(name_task("accumulate", micro_batch=2), 0)


def test_tasks_end_in_their_order(step: OpenStep) -> None:
    tasks = [name_task("accumulate", micro_batch=number) for number in range(2)]
    for task in tasks:
        step.begin(task)
    with pytest.raises(LocalProtocolError, match="to finish micro-batch 1 of step 0; 0 were"):
        step.check_end(tasks[1])
    step.check_end(tasks[0])
    step.end(tasks[0])
    step.check_end(tasks[1])


def test_scalars_hold_the_micro_batch_and_are_in_range() -> None:
    scalars = make_scalars(name_task("accumulate", 4, 2), 9, 0.5)
    assert scalars["splitonnx.key"].tolist() == [9, 4, 2]
    assert scalars["splitonnx.step"] == 5
    with pytest.raises(UsageError, match="learning rate"):
        make_scalars(name_task("train"), 0, float("nan"))


def test_a_stage_that_runs_again_reads_the_state_as_it_was_at_first(engine: Engine) -> None:
    """Another task may have committed in the meantime; what is updated is the state of now."""
    sources = {"x": Source.DATA, "w": Source.STATE}
    first = tiny.make_stage("forward", sources, ("kept",))
    again = msgspec.structs.replace(tiny.make_stage("again", sources, ("kept",)), after=("g",))
    last = tiny.make_stage("update", {"kept": Source.STASH, "w": Source.STATE}, ("new",))
    phase = Phase(name="train", stages=(first, again, last), wires=(tiny.make_wire("g", "server"),))
    flow = Dataflow(phase, "client")
    task = OpenTask(key=name_task("train"), phase=phase, flow=flow, progress=flow.start())
    x, old, new = (engine.from_array(np.full(2, value, np.float32)) for value in (0, 1, 2))
    task.keep({"x": x})
    assert task.feed(first, {"w": old}.__getitem__) == {"x": x, "w": old}
    assert task.feed(again, {"w": new}.__getitem__) == {"x": x, "w": old}
    task.values["kept"] = x
    assert task.feed(last, {"w": new}.__getitem__) == {"kept": x, "w": new}
