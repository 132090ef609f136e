"""The pairs found are those at which a graph can be divided, among all pairs of its tensors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import pytest

from splitonnx.errors import CutError, TooManyTries
from splitonnx.partitioner.cutting.candidates import pairs
from splitonnx.partitioner.cutting.candidates.pairs import PairSearch
from splitonnx.partitioner.cutting.cuts import divide, survey
from splitonnx.partitioner.inference.folds import note_shapes
from tests.partitioner.cutting.candidates.test_bisections import FLOAT, build_random

Names = tuple[tuple[str, ...], tuple[str, ...]]


def name_all(at: Sequence[ir.Value], tail_at: Sequence[ir.Value]) -> Names:
    return tuple(value.name or "" for value in at), tuple(value.name or "" for value in tail_at)


def try_all(
    graph: ir.Graph, sent: Sequence[ir.Value], state: set[str], trained: set[str]
) -> Iterator[Names]:
    """Try all pairs of tensors that nodes compute, with each choice of the inputs in ``sent``."""
    around = survey(graph, state=state, trainable=trained)
    values = [value for node in graph for value in node.outputs]
    choices = [c for n in range(len(sent) + 1) for c in itertools.combinations(sent, n)]
    for first, last in itertools.product(values, repeat=2):
        for beside in choices:
            at = (first, *beside)
            try:
                divide(graph, at, [last], state=state, trainable=trained, around=around)
            except CutError:
                continue
            yield name_all(at, [last])


@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_all_pairs_of_a_graph_are_found_and_no_others(seed: int, sent: bool) -> None:
    choice = random.Random(seed)
    graph, data, weights = build_random(choice)
    note_shapes(graph)
    state = {value.name or "" for value in weights}
    trained = {name for name in sorted(state) if choice.random() < 0.8}
    beside = data if sent else []
    search = PairSearch(graph, state=state, trainable=trained, sent=beside)
    found = [name_all(pair.at, pair.tail_at) for pair in search.find()]
    assert sorted(found) == sorted(try_all(graph, beside, state, trained))


def build_parallel() -> tuple[ir.Graph, dict[str, ir.Value]]:
    """Build two branches that join: x to stem, left and right to joined, then last."""
    values = {"x": ir.Value(name="x", type=FLOAT, shape=ir.Shape(["N", 4]))}
    nodes = []
    for name, reads in {
        "stem": ["x"], "left": ["stem"], "right": ["stem"], "joined": ["left", "right"],
        "last": ["joined"],
    }.items():  # fmt: skip
        inputs = [values[read] for read in reads]
        node = ir.node("Relu" if len(reads) == 1 else "Add", inputs, name=name)
        node.outputs[0].name, node.outputs[0].type = name, FLOAT
        nodes.append(node)
        values[name] = node.outputs[0]
    outputs = [values["last"]]
    graph = ir.Graph([values["x"]], outputs, nodes=nodes, opset_imports={"": 18}, name="parallel")
    note_shapes(graph)
    return graph, values


def test_both_branches_together_have_the_tails_that_neither_has_alone() -> None:
    graph, values = build_parallel()
    search = PairSearch(graph, state=(), trainable=())
    both = (values["left"], values["right"])
    assert [name_all(p.at, p.tail_at)[1] for p in search.find(both)] == [("joined",), ("last",)]
    assert list(search.find((values["left"],))) == []


def test_a_tail_of_both_branches_has_the_heads_before_them() -> None:
    graph, values = build_parallel()
    search = PairSearch(graph, state=(), trainable=())
    both = (values["left"], values["right"])
    assert [name_all(p.at, p.tail_at)[0] for p in search.find(None, both)] == [("stem",)]


def test_an_end_that_is_named_is_the_only_one_tried() -> None:
    graph, values = build_parallel()
    search = PairSearch(graph, state=(), trainable=())
    (pair,) = search.find((values["stem"],), (values["joined"],))
    names = {node.name for node in pair.server}
    assert names == {"left", "right", "joined"}


def test_more_pairs_than_can_be_tried_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, values = build_parallel()
    monkeypatch.setattr(pairs, "MOST_VISITS", 30)
    found = PairSearch(graph, state=(), trainable=()).find((values["stem"],), (values["last"],))
    assert len(list(found)) == 1
    with pytest.raises(TooManyTries, match="name one end with --at or --tail-at"):
        list(PairSearch(graph, state=(), trainable=()).find())
