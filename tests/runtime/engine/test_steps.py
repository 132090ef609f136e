"""A step of several micro-batches is kept beside the state until it ends."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from splitonnx.errors import LocalProtocolError, UsageError
from splitonnx.manifests import Phase, Source
from splitonnx.messages import TaskKey
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.dataflows import Dataflow
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.steps import OpenStep, OpenTask, make_scalars
from tests.support import tiny
from tests.support.zoo import ZOO


def name_task(phase: str, step: int = 0, micro_batch: int = 0) -> TaskKey:
    return TaskKey("a" * 32, phase, step, micro_batch)


@pytest.fixture
def engine() -> Engine:
    return Engine(threads=1)


@pytest.fixture
def step(engine: Engine) -> OpenStep:
    return OpenStep(cut(ZOO["chain"].build(), at=None).client.manifest, engine)


def test_sums_begin_at_zero_and_are_no_part_of_the_state(step: OpenStep, engine: Engine) -> None:
    before = {"w0": engine.from_array(np.ones(3, np.float32))}
    found = step.overlay(before)
    assert not engine.to_array(found["w0#gradient"]).any()
    added = engine.from_array(np.full(3, 2.0, np.float32))
    step.add({"w0#gradient": added, "statistic": added})
    assert step.overlay(before)["w0#gradient"] is added
    assert set(before) == {"w0"}
    assert step.close() == {"statistic": added}
    assert step.micro_batches == 0
    assert not engine.to_array(step.overlay(before)["w0#gradient"]).any()


def test_an_abandoned_step_leaves_nothing(step: OpenStep, engine: Engine) -> None:
    step.add({"statistic": engine.from_array(np.ones(3, np.float32))})
    step.reset()
    assert step.close() == {}


@pytest.mark.parametrize(
    ("done", "phase", "number", "message"),
    [
        (1, "accumulate", 0, "1 were accumulated"),
        (0, "accumulate", 1, "0 were accumulated"),
        (2, "update", 1, "2 were accumulated"),
        (0, "update", 0, "nothing was accumulated"),
        (1, "train", 0, "1 were accumulated"),
    ],
)
def test_a_micro_batch_is_neither_left_out_nor_doubled(
    step: OpenStep, done: int, phase: str, number: int, message: str
) -> None:
    for _ in range(done):
        step.add({})
    with pytest.raises(LocalProtocolError, match=message):
        step.check_next(name_task(phase, micro_batch=number), 0)


def test_tasks_of_the_step_follow_each_other(step: OpenStep) -> None:
    for number in range(2):
        step.check_next(name_task("accumulate", micro_batch=number), 0)
        step.add({})
    step.check_next(name_task("predict", 7), 0)  # it belongs to no step
    step.check_next(name_task("update", micro_batch=2), 0)
    with pytest.raises(LocalProtocolError, match="at step 1; the next is 0"):
        step.check_next(name_task("update", 1, 2), 0)


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
    task = OpenTask(phase=phase, flow=flow, progress=flow.start())
    x, old, new = (engine.from_array(np.full(2, value, np.float32)) for value in (0, 1, 2))
    task.keep({"x": x})
    assert task.feed(first, {"w": old}) == {"x": x, "w": old}
    assert task.feed(again, {"w": new}) == {"x": x, "w": old}
    task.values["kept"] = x
    assert task.feed(last, {"w": new}) == {"kept": x, "w": new}
