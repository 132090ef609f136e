"""What is decided about a pair from the nodes between its ends is what dividing decides."""

from __future__ import annotations

import random
from collections import Counter

import onnx_ir as ir
import pytest

from splitonnx.errors import CutError
from splitonnx.partitioner.cutting.candidates.regions import Regions
from splitonnx.partitioner.cutting.cuts import divide, survey
from splitonnx.partitioner.inference.folds import note_shapes
from tests.partitioner.cutting.candidates.test_bisections import FLOAT, build_random


@pytest.mark.parametrize("seed", [*range(20), 2059, 2568])
def test_a_verdict_is_that_of_the_whole_graph(seed: int) -> None:
    choice = random.Random(seed)
    graph, _, weights = build_random(choice)
    note_shapes(graph)
    state = {value.name or "" for value in weights}
    trained = {name for name in sorted(state) if choice.random() < 0.8}
    around = survey(graph, state=state, trainable=trained)
    regions = Regions(graph, around, trained)
    for first in (value for node in graph for value in node.outputs):
        for last in (value for node in graph for value in node.outputs):
            region = regions.find((first,), (last,))
            if region.is_legal is not None:
                try:
                    made = divide(
                        graph, [first], [last], state=state, trainable=trained, around=around
                    )
                except CutError:
                    made = None
                assert region.is_legal is (made is not None)
                if made is not None:
                    data = around.data
                    assert {n for n in made.server if set(n.outputs) & data} == {
                        n for n in region.nodes if set(n.outputs) & data
                    }


def test_pairs_without_sizes_are_decided_from_their_region() -> None:
    x, w = (ir.Value(name=n, type=FLOAT, shape=ir.Shape(["N", 4])) for n in ("x", "w"))
    first = ir.node("Mul", [x, w], name="first")
    second = ir.node("Relu", first.outputs, name="second")
    third = ir.node("Add", [second.outputs[0], first.outputs[0]], name="third")
    last = ir.node("Mul", [third.outputs[0], w], name="last")
    nodes = [first, second, third, last]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type = node.name, FLOAT
    graph = ir.Graph([x, w], last.outputs, nodes=nodes, opset_imports={"": 18}, name="skip")
    note_shapes(graph)
    regions = Regions(graph, survey(graph, state={"w"}, trainable={"w"}), {"w"})
    values = {node.name: node.outputs[0] for node in nodes}
    verdicts = Counter[str]()
    for one, other, verdict in (
        ("first", "second", True),  # the client adds what it sent
        ("first", "third", True),
        ("second", "third", None),  # reads what is before the head: left to divide
        ("third", "last", False),  # both parties would have the weight
    ):
        assert regions.find((values[one],), (values[other],)).is_legal is verdict
        verdicts[str(verdict)] += 1
    assert len(verdicts) == 3
