"""Tests of which party keeps a state, and of cuts that would divide one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import NotACut
from splitonnx.losses import Loss
from splitonnx.manifests import Role
from splitonnx.names import TRAIN
from splitonnx.partitioner.cutting.carried_states.placements import (
    leave_out_states,
    place_states,
)
from splitonnx.partitioner.cutting.cuts import Partition
from splitonnx.partitioner.cutting.preparations import find_roles, prepare
from splitonnx.partitioner.gate.adjustments import Adjustments
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.partitions import cut, cut_prepared
from splitonnx.verifications import verify
from tests.support.carried import (
    AVERAGES,
    BATCH,
    RECURRENT,
    Shapes,
    build_averages,
    build_recurrent,
    close,
)
from tests.support.nets import FLOAT, Net


def build_read_twice(*, is_recorded: bool = False) -> onnx.ModelProto:
    """Build three layers, of which the first and the last read the same state.

    If ``is_recorded`` is set, nothing but its own output reads the state, and that reads ``h``.
    """
    net = Net()
    hidden = net.op("Tanh", net.op("MatMul", "x", net.weight("w1", 3, 4), out="m"), out="h")
    first = hidden if is_recorded else net.op("Add", hidden, "old", out="a")
    value = net.op("Relu", net.op("MatMul", first, net.weight("w2", 4, 4), out="z"), out="p")
    last = value if is_recorded else net.op("Add", value, "old", out="b")
    net.op("MatMul", last, net.weight("w3", 4, 2), out="y")
    own = net.op("ReduceMean", hidden, net.constant("axis", np.array([0])), out="own", keepdims=0)
    net.op("Add", "old", own, out="new")
    inputs: Shapes = {"x": (FLOAT, ["N", 3]), "old": (FLOAT, [4])}
    outputs: Shapes = {"y": (FLOAT, ["N", 2]), "new": (FLOAT, [4])}
    return close(net, inputs, outputs)


def cut_read_twice(
    at: str | None, tail_at: tuple[str, ...] = (), *, is_recorded: bool = False
) -> Bundle:
    model = build_read_twice(is_recorded=is_recorded)
    return cut(model, at=at, tail_at=tail_at, loss="mse", states={"new": "old"})


def find_keepers(bundle: Bundle) -> set[str]:
    return {
        name
        for name, party in bundle.parties.items()
        for spec in party.manifest.state
        if spec.role is Role.BUFFER
    }


@pytest.mark.parametrize(("at", "tail_at"), [("z", ()), ("a", ())])
def test_a_state_that_both_parties_read_is_refused(at: str, tail_at: tuple[str, ...]) -> None:
    reason = r"both parties read the state 'old' \(--state new=old\), which one of them keeps"
    with pytest.raises(NotACut, match=reason):
        cut_read_twice(at, tail_at)


def test_a_cut_around_every_reader_gives_the_state_to_one_party() -> None:
    assert find_keepers(cut_read_twice("z", ("p",))) == {"client"}
    assert find_keepers(cut_read_twice("m")) == {"server"}


def test_a_state_does_not_cross_and_the_advice_names_cuts_that_keep_it_whole() -> None:
    reason = (
        r"the client reads the state 'h_in' \(--state h_out=h_in\), but does not compute 'h_out', "
        r"which replaces it, .* 'a' or 'h' would divide it"
    )
    with pytest.raises(NotACut, match=reason):
        cut(build_recurrent(), at="s", loss="mse", dims={"N": BATCH}, states=RECURRENT)


@pytest.mark.parametrize(
    ("at", "tail_at", "keeper"),
    [("z", (), "client"), ("h", (), "client"), ("m", (), "server"), ("m", ("z",), "server")],
)
def test_a_state_that_the_loss_does_not_see_belongs_to_whoever_can_compute_it(
    at: str, tail_at: tuple[str, ...], keeper: str
) -> None:
    assert find_keepers(cut_read_twice(at, tail_at, is_recorded=True)) == {keeper}


def test_states_are_left_out_of_predictions_unless_the_loss_reads_them() -> None:
    prepared = prepare(open_model(build_averages()), states=list(AVERAGES.items()))

    def list_outputs(*read: str) -> list[str | None]:
        return [value.name for value in leave_out_states(prepared, read).inference.graph.outputs]

    assert list_outputs("y") == ["y"]
    assert list_outputs("y", "mean_out") == ["y", "mean_out"]
    assert len(prepared.inference.graph.outputs) == 3


def test_without_states_a_partition_stays_as_it_is() -> None:
    adjustments = Adjustments(dims={"N": BATCH})
    prepared = prepare(open_model(build_recurrent(), adjustments), adjustments=adjustments)
    partition = Partition(at=(), tail_at=(), server=frozenset())
    graph = copy_model(prepared.training).graph
    placed = place_states(prepared, graph, partition)
    assert placed.partition is partition
    assert not placed.commits


def test_statistics_on_which_a_state_alone_depends_are_updated() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 3, 4), out="a")
    net.op("Add", net.batchnorm("a", 4, out="n", training=True), "old", out="new")
    value = net.op("MatMul", net.op("Tanh", "a", out="t"), net.weight("u", 4, 2), out="z")
    net.op("Add", value, net.op("ReduceMean", "old", out="own", keepdims=0), out="y")
    inputs: Shapes = {"x": (FLOAT, ["N", 3]), "old": (FLOAT, ["N", 4])}
    outputs: Shapes = {"y": (FLOAT, ["N", 2]), "new": (FLOAT, ["N", 4])}
    adjustments = Adjustments(dims={"N": BATCH})
    prepared = prepare(
        open_model(close(net, inputs, outputs), adjustments),
        adjustments=adjustments,
        states=[("new", "old")],
    )
    expected = {"old", "n.bn.mean", "n.bn.var"}
    roles = find_roles(prepared, "y")
    assert {name for name, role in roles.items() if role is Role.BUFFER} == expected
    bundle = cut_prepared(prepared, at="a", loss="mse")
    assert bundle.server is not None
    assert bundle.server.manifest.phase(TRAIN).commits.keys() >= expected


def test_a_state_that_a_loss_reads_before_the_tail_is_named_and_can_come_back_with_it() -> None:
    net = Net()
    read = net.op("MatMul", "x", net.weight("w", 3, 4), out="q")
    kept = net.op("MatMul", "h", net.weight("r", 4, 4), out="p")
    hidden = net.op("Tanh", net.op("Add", read, kept, out="s"), out="hn")
    net.op("MatMul", hidden, net.weight("u", 4, 2), out="y")
    inputs: Shapes = {"x": (FLOAT, ["N", 3]), "h": (FLOAT, ["N", 4])}
    model = close(net, inputs, {"y": (FLOAT, ["N", 2]), "hn": (FLOAT, ["N", 4])})
    losses = [Loss(kind="mse", output="y", labels="a"), Loss(kind="l1", output="hn", labels="b")]
    dims, states = {"N": BATCH}, {"hn": "h"}
    with pytest.raises(NotACut, match=r"'hn' would cross too; .* --tail-at as well"):
        cut(model, at="q", tail_at="y", loss=losses, dims=dims, states=states)
    bundle = cut(model, at="q", tail_at=("y", "hn"), loss=losses, dims=dims, states=states)
    random = np.random.default_rng(0)
    sizes = {"x": 3, "a": 2, "b": 4}
    data = {n: random.standard_normal((BATCH * 3, size), np.float32) for n, size in sizes.items()}
    assert verify(bundle, data, steps=3, batch_size=BATCH).ok
