"""Stages: a joint graph comes apart by messages, each node once, and stash is what is kept."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from splitonnx.partitioner.cutting.stages import Crossing, StageCut, cut_stages
from splitonnx.partitioner.graphs.traversals import map_values

FLOAT = ir.TensorType(ir.DataType.FLOAT)


class Drawing:
    """A graph of float vectors, written a node at a time."""

    def __init__(self, *inputs: str) -> None:
        self.values = {n: ir.Value(name=n, type=FLOAT, shape=ir.Shape([3])) for n in inputs}
        self.inputs = list(self.values.values())
        self.nodes: list[ir.Node] = []

    def op(self, kind: str, out: str, *inputs: str) -> None:
        node = ir.node(kind, [self.values[name] for name in inputs], name=f"{out}_node")
        node.outputs[0].name, node.outputs[0].type = out, FLOAT
        node.outputs[0].shape = ir.Shape([3])
        self.nodes.append(node)
        self.values[out] = node.outputs[0]

    def finish(self, *outputs: str) -> ir.Graph:
        return ir.Graph(
            self.inputs, [self.values[name] for name in outputs], nodes=self.nodes,
            opset_imports={"": 18}, name="joint",
        )  # fmt: skip


def draw_ping_pong() -> tuple[ir.Graph, list[Crossing], dict[str, list[ir.Value]]]:
    """``a`` goes up, ``b`` comes back, and the client ends with what it kept of ``a``'s making."""
    drawing = Drawing("x", "w", "v")
    drawing.op("Mul", "kept", "x", "w")
    drawing.op("Tanh", "a", "kept")
    drawing.op("Mul", "b", "a", "v")
    drawing.op("Add", "c", "b", "kept")
    drawing.op("Neg", "extra", "a")
    drawing.op("Exp", "d", "b")
    graph = drawing.finish("c", "d")
    values = map_values(graph)
    crossings = [
        Crossing(value=values["a"], sender="client", receiver="server"),
        Crossing(value=values["b"], sender="server", receiver="client"),
    ]
    return graph, crossings, {"client": [values["c"]], "server": [values["d"]]}


def describe(stages: list[StageCut]) -> list[tuple[str, int, tuple[str, ...], tuple[str, ...]]]:
    return [(stage.party, stage.level, stage.inputs, stage.outputs) for stage in stages]


def test_stages_are_cut_at_messages_and_in_the_order_in_which_they_run() -> None:
    graph, crossings, targets = draw_ping_pong()
    assert describe(cut_stages(graph, crossings, targets)) == [
        ("client", 0, ("x", "w"), ("kept", "a")),
        ("server", 1, ("a", "v"), ("b", "d")),
        ("client", 2, ("b", "kept"), ("c",)),
    ]


def test_what_no_message_precedes_is_computed_with_the_first_values_that_are_sent() -> None:
    graph, crossings, targets = draw_ping_pong()
    values = map_values(graph)
    node = ir.node("Neg", [values["v"]], name="alone_node")
    alone = node.outputs[0]
    alone.name, alone.type, alone.shape = "alone", FLOAT, ir.Shape([3])
    graph.append(node)
    targets = {**targets, "server": [*targets["server"], alone]}
    assert describe(cut_stages(graph, crossings, targets)) == [
        ("client", 0, ("x", "w"), ("kept", "a")),
        ("server", 1, ("a", "v"), ("b", "d", "alone")),
        ("client", 2, ("b", "kept"), ("c",)),
    ]


def test_no_node_is_computed_twice_and_none_that_nobody_needs() -> None:
    stages = cut_stages(*draw_ping_pong())
    names = [node.name or "" for stage in stages for node in stage.view]
    assert sorted(names) == sorted(set(names))
    assert "extra_node" not in names


def test_stages_run_one_after_the_other_compute_what_the_graph_does() -> None:
    graph, crossings, targets = draw_ping_pong()
    feeds = {
        n: np.random.default_rng(i).standard_normal(3, np.float32) for i, n in enumerate("xwv")
    }
    first, second = ReferenceEvaluator(ir.to_proto(ir.Model(graph, ir_version=9))).run(None, feeds)
    known: dict[str, dict[str, np.ndarray]] = {"client": dict(feeds), "server": dict(feeds)}
    for stage in cut_stages(graph, crossings, targets):
        proto = ir.to_proto(ir.Model(stage.extract(), ir_version=9))
        own = {name: known[stage.party][name] for name in stage.inputs}
        made = dict(zip(stage.outputs, ReferenceEvaluator(proto).run(None, own), strict=True))
        known[stage.party] |= {name: np.asarray(array) for name, array in made.items()}
        for crossing in crossings:
            name = crossing.value.name or ""
            if crossing.sender == stage.party and name in made:
                known[crossing.receiver][name] = np.asarray(made[name])
    np.testing.assert_array_equal(known["client"]["c"], np.asarray(first))
    np.testing.assert_array_equal(known["server"]["d"], np.asarray(second))


def test_without_a_wire_there_is_one_stage() -> None:
    graph, _, targets = draw_ping_pong()
    values = [*targets["client"], *targets["server"]]
    (stage,) = cut_stages(graph, [], {"client": values})
    assert stage.inputs == ("x", "w", "v")
    assert set(stage.outputs) == {"c", "d"}


def test_a_target_that_needs_no_message_is_ready_before_them() -> None:
    graph, crossings, targets = draw_ping_pong()
    targets["client"].append(map_values(graph)["extra"])
    stages = cut_stages(graph, crossings, targets)
    assert stages[0].outputs == ("kept", "a", "extra")


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_level_counts_the_wires_on_the_longest_way(rounds: int) -> None:
    drawing = Drawing("x")
    drawing.op("Neg", "c0", "x")
    for index in range(rounds):
        drawing.op("Tanh", f"s{index}", f"c{index}")
        drawing.op("Add", f"c{index + 1}", f"s{index}", "c0")
    graph = drawing.finish(f"c{rounds}")
    values = map_values(graph)
    crossings = []
    for index in range(rounds):
        up, down = values[f"c{index}"], values[f"s{index}"]
        crossings.append(Crossing(value=up, sender="client", receiver="server"))
        crossings.append(Crossing(value=down, sender="server", receiver="client"))
    stages = cut_stages(graph, crossings, {"client": [values[f"c{rounds}"]], "server": []})
    assert [(s.party, s.level) for s in stages] == [
        ("client" if level % 2 == 0 else "server", level) for level in range(2 * rounds + 1)
    ]


def test_what_is_extracted_shares_nothing_with_the_joint_graph() -> None:
    graph, crossings, targets = draw_ping_pong()
    before = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString(deterministic=True)
    for stage in cut_stages(graph, crossings, targets):
        extracted = stage.extract()
        extracted[0].op_type = "Broken"
    after = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString(deterministic=True)
    assert after == before


@pytest.mark.parametrize(
    ("ops", "outputs", "left"),
    [
        ([("Neg", "a", "x"), ("Identity", "b", "a")], "b", ["Neg"]),
        ([("Identity", "a", "x"), ("Neg", "b", "a"), ("Exp", "c", "a")], "bc", ["Neg", "Exp"]),
        ([("Neg", "a", "x"), ("Identity", "b", "a"), ("Exp", "c", "a")], "bc", ["Neg", "Exp"]),
        ([("Neg", "a", "x"), ("Identity", "b", "a"), ("Identity", "c", "b")], "c", ["Neg"]),
        ([("Identity", "a", "x")], "a", ["Identity"]),
        ([("Neg", "a", "x"), ("Identity", "b", "a")], "ab", ["Neg", "Identity"]),
        (
            [("Neg", "a", "x"), ("Identity", "b", "a"), ("Identity", "c", "a")],
            "bc",
            ["Neg", "Identity"],
        ),
        ([("Identity", "a", "x"), ("Identity", "b", "a")], "b", ["Identity"]),
    ],
    ids=["of what is made", "of an input", "read beside", "in a row", "of an input to an output",
         "of an output", "twice", "in a row from an input to an output"],
)  # fmt: skip
def test_an_identity_is_left_out_where_one_tensor_can_have_the_name(
    ops: list[tuple[str, str, str]], outputs: str, left: list[str]
) -> None:
    drawing = Drawing("x")
    for op in ops:
        drawing.op(*op)
    graph = drawing.finish(*outputs)
    (stage,) = cut_stages(graph, [], {"client": [drawing.values[name] for name in outputs]})
    extracted = stage.extract()
    assert sorted(node.op_type for node in extracted) == sorted(left)
    assert tuple(value.name for value in extracted.outputs) == stage.outputs
    assert all(value.type == FLOAT for value in extracted.outputs)
    feeds = {"x": np.random.default_rng(0).standard_normal(3, np.float32)}
    whole, short = (
        dict(
            zip(stage.outputs, ReferenceEvaluator(ir.to_proto(model)).run(None, feeds), strict=True)
        )
        for model in (ir.Model(stage.view.clone(), ir_version=9), ir.Model(extracted, ir_version=9))
    )
    for name, array in whole.items():
        np.testing.assert_array_equal(np.asarray(short[name]), np.asarray(array))
