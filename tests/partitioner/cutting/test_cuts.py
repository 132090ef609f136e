"""Where a model can be cut: names to tensors, tensors to a partition, and why some are none."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
from onnx import helper

from splitonnx.errors import NotACut, SharedParameter, UsageError
from splitonnx.partitioner.cutting.cuts import (
    Partition,
    Sides,
    Surroundings,
    check_use,
    divide,
    find_duplicated,
    find_lost,
    find_opened,
    list_kept_outputs,
    list_server_outputs,
    survey,
    trace_sides,
)
from splitonnx.partitioner.cutting.passes.given_names import resolve_names
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.traversals import find_data, map_values
from tests.support.zoo import FLOAT, ZOO, Net


def lift(model: object) -> tuple[ir.Graph, list[str]]:
    """Make graph inputs of a model's weights, as preparation does, and name those of floats."""
    graph = ir.from_proto(model).graph  # type: ignore[call-overload]
    names = []
    for name, value in list(graph.initializers.items()):
        if value.dtype == ir.DataType.FLOAT:
            value.const_value = None
            del graph.initializers[name]
            graph.inputs.append(value)
            names.append(name)
    return graph, names


def cut(name: str, at: list[str], tail_at: list[str] | None = None) -> tuple[ir.Graph, Partition]:
    graph, weights = lift(ZOO[name].build())
    first, last = resolve_names(graph, at), resolve_names(graph, tail_at or [])
    return graph, divide(graph, first, last, state=weights, trainable=weights)


def names(nodes: object) -> list[str]:
    return sorted(node.outputs[0].name or "" for node in nodes)  # type: ignore[attr-defined]


def test_the_server_has_what_lies_behind_the_cut() -> None:
    _, partition = cut("chain", ["act1"])
    assert names(partition.server) == ["act2", "act3", "linear2", "linear3", "linear4"]
    assert names(partition.client) == ["act0", "act1", "linear0", "linear1"]


def test_between_two_cuts_is_the_server_and_around_them_the_client() -> None:
    _, partition = cut("chain", ["act0"], ["act1"])
    assert names(partition.server) == ["act1", "linear1"]
    assert {"linear0", "linear4"} <= set(names(partition.client))


def test_without_a_cut_everything_is_the_clients() -> None:
    _, partition = cut("chain", [])
    assert (partition.at, partition.server) == ((), frozenset())
    with pytest.raises(UsageError, match="--at"):
        cut("chain", [], ["act1"])


def test_what_would_cross_too_is_named() -> None:
    with pytest.raises(NotACut) as caught:
        cut("residual", ["m2"])
    assert list(caught.value.missing) == ["r1"]
    _, partition = cut("residual", ["m2", "r1"])
    assert "sum" in names(partition.server)


def test_a_raw_input_that_would_cross_is_named_as_one() -> None:
    with pytest.raises(NotACut) as caught:
        cut("two_inputs", ["ta"])
    assert set(caught.value.missing) & {"b", "rb"}
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w1", 6, 5), out="h")
    net.op("MatMul", net.op("Mul", hidden, "mask", out="m"), net.weight("w2", 5, 3), out="y")
    graph, weights = lift(net.finish({"x": (FLOAT, ["N", 6]), "mask": (FLOAT, ["N", 5])}, "y", 3))
    with pytest.raises(NotACut) as caught:
        divide(graph, resolve_names(graph, ["h"]), state=weights, trainable=weights)
    assert (list(caught.value.missing), list(caught.value.raw)) == (["mask"], ["mask"])


def test_a_tensor_of_no_data_is_no_cut() -> None:
    graph, weights = lift(ZOO["chain"].build())
    with pytest.raises(NotACut, match="'w0' does not depend on the model's inputs"):
        divide(graph, resolve_names(graph, ["w0"]), state=weights, trainable=weights)


def test_nothing_may_be_left_for_nobody() -> None:
    graph, _ = lift(ZOO["chain"].build())
    output = graph.outputs[0].name or ""
    with pytest.raises(NotACut, match="nothing would be left for the server"):
        cut("chain", [output])


def test_a_tensor_that_its_receiver_does_not_use_is_refused() -> None:
    with pytest.raises(NotACut, match="the server's part does not use 'act0'"):
        cut("chain", ["act0", "act1"])
    with pytest.raises(NotACut, match="the client's part does not use 'act1'"):
        cut("chain", ["act0"], ["act1", "act2"])


def test_a_parameter_that_both_sides_would_train_is_refused() -> None:
    net = Net()
    shared = net.weight("w", 6, 6)
    hidden = net.op("Tanh", net.op("MatMul", "x", shared, out="m1"), out="h")
    net.op("MatMul", hidden, shared, out="y")
    graph, weights = lift(net.finish({"x": (FLOAT, ["N", 6])}, "y", 6))
    at = resolve_names(graph, ["h"])
    with pytest.raises(SharedParameter, match="'w'"):
        divide(graph, at, state=weights, trainable=weights)
    assert divide(graph, at, state=weights).server  # frozen, both may have it


def test_a_tied_weight_may_stay_with_the_client_on_both_ends() -> None:
    net = Net()
    tied = net.weight("tied", 6, 6)
    hidden = net.op("Tanh", net.op("MatMul", "x", tied, out="m1"), out="h")
    middle = net.op("Relu", net.op("MatMul", hidden, net.weight("w", 6, 6), out="m2"), out="r")
    net.op("MatMul", middle, tied, out="y")
    graph, weights = lift(net.finish({"x": (FLOAT, ["N", 6])}, "y", 6))
    first, last = resolve_names(graph, ["h"]), resolve_names(graph, ["r"])
    assert divide(graph, first, last, state=weights, trainable=weights).server
    with pytest.raises(SharedParameter):
        divide(graph, first, state=weights, trainable=weights)


def test_a_survey_of_the_graph_serves_every_partition() -> None:
    graph, weights = lift(ZOO["residual"].build())
    around = survey(graph, state=weights, trainable=weights)
    assert [value.name for value in around.raw] == ["x"]
    for at in (["m1"], ["r1"], ["m2", "r1"], ["sum"]):
        values = resolve_names(graph, at)
        assert divide(graph, values, state=weights, trainable=weights) == divide(
            graph, values, state=weights, trainable=weights, around=around
        )


def test_an_output_of_raw_data_is_the_servers_only_where_it_depends_on_the_cut() -> None:
    model = ZOO["residual"].build()
    model.graph.node.append(helper.make_node("Neg", ["x"], ["negated"]))
    model.graph.output.append(helper.make_tensor_value_info("negated", FLOAT, None))
    graph, weights = lift(model)
    around = survey(graph, state=weights, trainable=weights)
    assert [value.name for value in around.passing] == ["negated"]
    assert not survey(graph, state=weights, trainable=weights, is_training=True).passing
    for at, is_kept in ((["sum"], True), (["x"], False)):
        values = resolve_names(graph, at)
        partition = divide(graph, values, state=weights, trainable=weights, around=around)
        kept = [value.name for value in list_kept_outputs(graph, values, around)]
        served = [value.name for value in list_server_outputs(graph, values, around)]
        assert ("negated" in kept, "negated" in served) == (is_kept, not is_kept)
        assert ("negated" in names(partition.client)) is is_kept


# --- the three steps of a partition -----------------------------------------------------------


def trace(
    name: str, at: list[str], tail_at: list[str] | None = None
) -> tuple[ir.Graph, Sides, Surroundings, list[str]]:
    graph, weights = lift(ZOO[name].build())
    around = survey(graph, state=weights, trainable=weights)
    first, last = resolve_names(graph, at), resolve_names(graph, tail_at or [])
    return graph, trace_sides(graph, first, last, around), around, weights


def test_a_side_ends_in_what_it_receives_and_in_weights() -> None:
    _, sides, *_ = trace("chain", ["act0"], ["act1"])
    assert names(sides.server.nodes) == ["act1", "linear1"]
    assert {value.name for value in sides.server.sources} == {"act0", "w1", "b1"}
    assert names(sides.client.nodes) == [
        "act0", "act2", "act3", "linear0", "linear2", "linear3", "linear4",
    ]  # fmt: skip
    assert {"x", "act1", "w0", "w4"} <= {value.name for value in sides.client.sources}


def test_sides_are_traced_where_the_cut_is_none_too() -> None:
    graph, sides, around, weights = trace("residual", ["m2"])
    assert names(sides.server.nodes & sides.client.nodes) == ["m1", "r1"]
    assert {value.name for value in sides.server.sources} & {"x"}
    check_use(sides, around.data)  # each has work
    with pytest.raises(NotACut) as caught:
        find_duplicated(graph, sides, around, weights)
    assert (list(caught.value.missing), list(caught.value.raw)) == (["r1"], [])


def test_sides_cannot_be_traced_from_a_tensor_of_no_data() -> None:
    with pytest.raises(NotACut, match="'w0' does not depend on the model's inputs"):
        trace("chain", ["w0"])


def test_a_party_without_work_or_with_what_it_does_not_use_is_refused() -> None:
    _, sides, around, _ = trace("chain", ["act0", "act1"])
    with pytest.raises(NotACut, match="the server's part does not use 'act0'") as caught:
        check_use(sides, around.data)
    assert caught.value.tensors == ["act0", "act1"]
    nobody = replace(sides, server=replace(sides.server, nodes=set()))
    with pytest.raises(NotACut, match="nothing would be left for the server"):
        check_use(nobody, around.data)
    _, sides, around, _ = trace("chain", ["act0"], ["act1"])
    check_use(sides, around.data)


def test_a_node_of_data_is_on_both_sides_only_where_its_data_cross_anyway() -> None:
    net = Net()
    doubled = net.op("Add", "mask", "mask", out="doubled")
    hidden = net.op(
        "Mul", net.op("MatMul", "x", net.weight("w1", 6, 5), out="m1"), doubled, out="h"
    )
    last = net.op(
        "Mul", net.op("MatMul", hidden, net.weight("w2", 5, 5), out="m2"), doubled, out="l"
    )
    net.op("MatMul", last, net.weight("w3", 5, 3), out="y")
    graph, weights = lift(net.finish({"x": (FLOAT, ["N", 6]), "mask": (FLOAT, ["N", 5])}, "y", 3))
    around = survey(graph, state=weights, trainable=weights)
    sides = trace_sides(graph, resolve_names(graph, ["h", "mask"]), (), around)
    assert names(find_duplicated(graph, sides, around, weights)) == ["doubled"]
    sides = trace_sides(graph, resolve_names(graph, ["h"]), (), around)
    with pytest.raises(NotACut) as caught:
        find_duplicated(graph, sides, around, weights)
    assert (list(caught.value.missing), list(caught.value.raw)) == (["doubled"], ["mask"])


def test_a_tail_that_the_client_computes_itself_is_refused() -> None:
    net = Net()
    net.op("Neg", "x", out="bare")
    net.nodes.append(helper.make_node("Split", ["bare"], ["s1", "s2"], axis=1, num_outputs=2))
    weighted = net.op("MatMul", "s1", net.weight("w", 3, 3), out="m")
    net.op("Add", weighted, "s2", out="y")
    graph, weights = lift(net.finish({"x": (FLOAT, ["N", 6])}, "y", 3))
    values = map_values(graph)
    with pytest.raises(NotACut):  # the client needs the Split for s2, so it has s1 too
        divide(graph, [values["bare"]], [values["s1"]], state=weights, trainable=weights)
    found = divide(graph, [values["bare"]], [values["m"]], state=weights, trainable=weights)
    assert names(found.duplicated) == ["s1"]


def test_shapes_are_read_from_the_cut_itself() -> None:
    """Both parties know the batch; the far one has it from what it receives."""
    prepared = prepare(open_model(ZOO["shape_paths"].build()))
    graph = prepared.inference.graph
    at, state = resolve_names(graph, ["mean"]), prepared.state
    partition = divide(graph, at, state=state, trainable=prepared.trainable)
    held = {value for values in partition.remote_shapes["server"].values() for value in values}
    assert held == {map_values(graph)["mean"]}


def test_an_integer_cut_loses_the_gradient_of_what_lies_before_it() -> None:
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w", 6, 5), out="h")
    net.op("Cast", net.op("ArgMax", hidden, out="place", axis=1, keepdims=0), out="y", to=FLOAT)
    graph, weights = lift(net.finish({"x": (FLOAT, ["N", 6])}, "y"))
    values = map_values(graph)
    for name in ("place", "h"):
        values[name].dtype = ir.DataType.INT64 if name == "place" else ir.DataType.FLOAT
    assert find_lost([values["place"]], weights) == (values["place"], ["w"])
    assert find_lost([values["place"]], []) is None
    assert find_lost([values["h"]], weights) is None
    assert find_lost([values["h"], values["place"]], weights) is None  # the other serves w


def test_what_is_made_of_sent_data_alone_is_open_until_a_parameter_comes_in() -> None:
    graph, weights = lift(ZOO["two_inputs"].build())
    values = map_values(graph)
    data = find_data(graph, [values["a"], values["b"]])
    assert find_opened(graph, [values["b"]], data, weights) == {values["b"]}
    opened = find_opened(graph, [values["b"]], data, [])
    assert {value.name for value in opened} == {"b", "mb", "rb"}
