from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from splitonnx.manifests import Phase, Source, Wire, WireKind
from splitonnx.runtime.engine.dataflows import Dataflow, can_overlap, list_steady, list_sums
from splitonnx.tensors import TensorSpec
from tests.support import tiny

CLIENT = tiny.split_bundle().client.manifest.phase("train")


def test_a_stage_is_ready_when_all_its_inputs_are_there_and_state_always_is() -> None:
    progress = Dataflow(CLIENT, "client").start()
    assert progress.next_stage() is None
    progress.arrive(["x"])
    stage = progress.next_stage()
    assert stage is not None
    assert stage.name == "head.forward"
    assert progress.next_stage() is None


def test_among_ready_stages_the_manifest_decides_the_order() -> None:
    stages = tuple(tiny.make_stage(name, {"x": Source.DATA}, (name,)) for name in ("b", "a", "c"))
    progress = Dataflow(Phase(name="train", stages=stages), "client").start()
    progress.arrive(["x"])
    order = [stage.name for _ in range(3) if (stage := progress.next_stage())]
    assert order == ["b", "a", "c"]


def test_data_that_travel_are_offered_once_and_in_the_order_of_the_wires() -> None:
    progress = Dataflow(CLIENT, "client").start()
    progress.arrive(["labels", "x", "h"])
    assert progress.next_wires() == ("h", "labels")
    assert progress.next_wires() == ()


def test_a_task_is_finished_when_stages_ran_and_wires_were_sent_and_received() -> None:
    progress = Dataflow(CLIENT, "client").start()
    progress.arrive(["x", "labels", "splitonnx.learning_rate", "h", "h.grad", "W1.grad"])
    while progress.next_stage():
        assert not progress.is_finished
    assert progress.missing == {"loss"}
    progress.arrive(["loss"])
    assert not progress.is_finished  # the outgoing wires are still here
    progress.next_wires()
    assert progress.is_finished


def test_a_phase_without_anything_to_do_is_finished_at_once() -> None:
    assert Dataflow(Phase(name="predict"), "client").start().is_finished


def test_a_value_is_released_after_its_last_use_and_not_before() -> None:
    progress = Dataflow(CLIENT, "client").start()
    assert progress.release(["x"]) == ()  # head.backward takes it too
    assert progress.release(["x"]) == ("x",)
    assert progress.release(["h"]) == ()  # a stage takes it, and it is a wire
    assert progress.release(["h"]) == ("h",)


def test_results_and_commits_are_never_released() -> None:
    progress = Dataflow(CLIENT, "client").start()
    assert progress.release(["loss", "W1.new"]) == ()
    assert progress.wants("loss")
    assert progress.wants("W1.m.new")
    assert not progress.wants("a")


def make_repeating() -> Phase:
    """Make stages of which the third makes ``kept`` again, which the second and the last read."""
    again = tiny.make_stage("again", {"x": Source.DATA, "w": Source.STATE}, ("kept",))
    return Phase(
        name="train",
        stages=(
            tiny.make_stage("forward", {"x": Source.DATA, "w": Source.STATE}, ("kept", "h")),
            tiny.make_stage("middle", {"kept": Source.STASH}, ("m",)),
            msgspec.structs.replace(again, after=("g",)),
            tiny.make_stage("backward", {"kept": Source.STASH, "g": Source.WIRE}, ("new",)),
        ),
        wires=(tiny.make_wire("h", "client"), tiny.make_wire("g", "server")),
        commits={"w": "new"},
    )


def test_what_is_made_again_is_dropped_until_then() -> None:
    flow = Dataflow(make_repeating(), "client")
    progress = flow.start()

    def run(expected: str) -> None:
        stage = progress.next_stage()
        assert stage is not None
        assert stage.name == expected

    progress.arrive(["x"])
    run("forward")
    progress.arrive(["kept", "h"])
    assert progress.wants("kept")
    assert progress.release(["x"]) == ()  # it is needed to make the value again
    run("middle")
    assert progress.release(["kept"]) == ("kept",)
    assert progress.next_stage() is None  # the gradient is not there
    assert not progress.wants("kept")
    progress.arrive(["g"])
    run("again")
    assert progress.wants("kept")
    assert progress.release(["x", "g"]) == ("x",)
    run("backward")
    assert progress.release(["kept", "g"]) == ("kept", "g")
    assert flow.reread == {"w"}


def test_wires_of_other_parties_are_neither_sent_nor_awaited() -> None:
    flow = Dataflow(CLIENT, "observer")
    assert flow.sends == ()
    assert not flow.receives


def test_one_task_leaves_another_as_it_was() -> None:
    flow = Dataflow(CLIENT, "client")
    first, second = flow.start(), flow.start()
    first.arrive(["x"])
    first.release(["x"])
    assert first.next_stage()
    assert second.next_stage() is None
    assert second.release(["x"]) == ()


def test_a_stage_whose_state_is_not_there_lets_others_pass() -> None:
    stages = tuple(tiny.make_stage(name, {"x": Source.DATA}, (name,)) for name in ("a", "b"))
    progress = Dataflow(Phase(name="accumulate", stages=stages), "client").start()
    progress.arrive(["x"])
    found = progress.next_stage(lambda stage: stage.name == "b")
    assert found is not None
    assert found.name == "b"
    assert progress.next_stage(lambda _: False) is None
    assert progress.has_all_values
    assert progress.next_stage() is not None
    assert not progress.has_all_values


def test_what_a_micro_batch_changes_is_not_kept_in_its_task() -> None:
    phase = Phase(name="accumulate", stages=CLIENT.stages, commits={"W1": "W1.new"})
    assert not Dataflow(phase, "client").start().wants("W1.new")
    assert Dataflow(Phase(name="train", commits={"W1": "W1.new"}), "client").start().wants("W1.new")


@pytest.mark.parametrize(
    ("commits", "expected"),
    [
        ({}, True),
        ({"sum": "sum/new"}, True),  # by the stage that reads it
        ({"mean": "mean/new"}, True),  # before the reply, as it is read
        ({"mean": "sum/new"}, False),  # after the reply, and read before it
        ({"mean": "reply"}, False),  # by the other party
        ({"sum": "mean/new"}, True),
        ({"unread": "sum/new"}, True),
    ],
)
def test_tasks_overlap_unless_one_reads_early_what_another_changes_late(
    commits: dict[str, str], expected: bool
) -> None:
    reply = Wire(
        tensor=tiny.spec("h.grad"), sender="server", receiver="client", kind=WireKind.GRADIENT
    )
    stages = (
        tiny.make_stage("adder", {"sum": Source.STATE, "grad": Source.STASH}, ("sum/new",)),
        tiny.make_stage("backward", {"h.grad": Source.WIRE}, ("grad",)),
        tiny.make_stage("forward", {"x": Source.DATA, "mean": Source.STATE}, ("h", "mean/new")),
    )
    commits = {state: "h.grad" if value == "reply" else value for state, value in commits.items()}
    phase = Phase(name="accumulate", stages=stages, wires=(reply,), commits=commits)
    assert can_overlap(phase, "client") is expected


def test_steady_inputs_are_the_state_that_micro_batches_do_not_change() -> None:
    inputs = {"x": Source.DATA, "w": Source.STATE, "mean": Source.STATE}
    stage = tiny.make_stage("body", inputs, ("y", "mean_next"))
    commits = {"mean": "mean_next"}
    adding = Phase(name="accumulate", stages=(stage,), commits=commits)
    assert list_steady(adding, stage) == ("w",)
    assert list_steady(Phase(name="train", stages=(stage,), commits=commits), stage) == ()


SUM, ADDED = "w#gradient", "w#gradient#next"
READS = {"grad": Source.STASH, SUM: Source.STATE}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {SUM: ADDED}),
        ({"name": "update"}, {}),
        ({"commits": {}}, {}),
        ({"commits": {SUM: "grad"}}, {}),
        ({"commits": {SUM: ADDED, "other": ADDED}}, {}),
        ({"results": (ADDED,)}, {}),
        ({"stages": ({"x": Source.STASH}, "x")}, {SUM: ADDED}),
        ({"stages": ({SUM: Source.STATE}, "x")}, {}),
        ({"stages": ({ADDED: Source.STASH}, "x")}, {}),
    ],
)
@pytest.mark.parametrize("is_sent", [False, True])
def test_a_sum_is_changed_in_place_if_only_the_next_micro_batch_reads_it(
    change: dict[str, Any], expected: dict[str, str], is_sent: bool
) -> None:
    adding = tiny.make_stage("accumulate", READS, (ADDED,))
    spec = TensorSpec(name=SUM, dtype="F32", shape=(3,))
    wires = (Wire(tensor=replace(spec, name=ADDED), sender="client", receiver="server",
                  kind=WireKind.GRADIENT),)  # fmt: skip
    fields: dict[str, Any] = {"name": "accumulate", "commits": {SUM: ADDED}} | change
    others = [tiny.make_stage("other", *fields.pop("stages"))] if "stages" in change else []
    phase = Phase(stages=(adding, *others), wires=wires if is_sent else (), **fields)
    manifest = replace(tiny.split_bundle().client.manifest, phases=(phase,))
    assert list_sums(manifest, phase, adding) == {}
    summing = replace(manifest, accumulators=(spec,))
    assert list_sums(summing, phase, adding) == ({} if is_sent else expected)
    for stage in others:
        assert list_sums(summing, phase, stage) == {}
