"""Models of many nodes: the work on them takes in each node once, in few questions."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from threading import Barrier, Thread
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.commands.printing import print_cuts
from splitonnx.errors import NativeCrash, NotAModel, UnsupportedModel
from splitonnx.partitioner.gate import gates
from splitonnx.partitioner.gate.adjustments import Adjustments
from splitonnx.partitioner.gate.gates import ModelSource
from splitonnx.partitioner.graphs.pauses import pause_collection
from splitonnx.partitioner.inference import node_types
from splitonnx.partitioner.lowerings import lower
from splitonnx.partitioner.native.requests import RequestWriter
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.inspections import inspect
from tests.support.zoo import ZOO


def build_row(nodes: int) -> bytes:
    """One matrix, then activations in a row."""
    row = [helper.make_node("MatMul", ["x", "w"], ["v0"])]
    for index in range(1, nodes):
        row.append(helper.make_node("Sigmoid", [f"v{index - 1}"], [f"v{index}"]))
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4])
        for name in ("x", f"v{nodes - 1}")
    ]
    weight = numpy_helper.from_array(np.full((4, 4), 0.1, np.float32), "w")
    graph = helper.make_graph(row, "row", values[:1], values[1:], [weight])
    opsets = [helper.make_opsetid("", 18)]
    content: bytes = helper.make_model(
        graph, opset_imports=opsets, ir_version=9
    ).SerializeToString()
    return content


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that native code was asked with, by function."""
    sizes: Counter[str] = Counter()
    write = RequestWriter.write

    def spy(self: RequestWriter, name: str, arguments: Sequence[Any]) -> bytes:
        request = write(self, name, arguments)
        sizes[name] += len(request)
        return request

    monkeypatch.setattr(RequestWriter, "write", spy)
    return sizes


def test_types_are_asked_for_by_kinds_of_node_whose_number_does_not_grow(
    asked: Counter[str],
) -> None:
    sizes = []
    for nodes in (1200, 2400):  # in the joint graph there are two of each, and the loss
        asked.clear()
        cut(build_row(nodes), at="v0", loss="mse")
        sizes.append(asked["list_types"])
    assert sizes[0] == sizes[1] < 10_000


@pytest.mark.parametrize("name", sorted(ZOO))
def test_kinds_of_node_say_the_types_that_the_whole_graph_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def spy(model: ir.Model) -> object:
        kinds, whole = node_types._ask_kinds(model), node_types._ask_graph(model)
        found.append((kinds, {value: whole[value] for value in kinds}))
        untyped = {v.name for n in model.graph for v in n.outputs if v.name and v.type is None}
        assert untyped == set(kinds)
        return whole

    monkeypatch.setattr("splitonnx.partitioner.differentiation.derived.derivations.list_types", spy)
    cut(ZOO[name].build(), at=None, loss=ZOO[name].loss)
    ((kinds, whole),) = found
    assert kinds == whole


def test_a_graph_whose_kinds_of_node_are_refused_is_asked_for_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node_types, "FEW_NODES", 0)
    model = ZOO["pools"].build()
    asked_whole, whole = [], node_types._ask_graph

    def ask(model: ir.Model) -> Mapping[str, str]:
        asked_whole.append(model)
        return whole(model)

    def refuse(model: ir.Model) -> Mapping[str, str]:
        raise NativeCrash("the joint graph", "broke down over it")

    monkeypatch.setattr(node_types, "_ask_kinds", refuse)
    monkeypatch.setattr(node_types, "_ask_graph", ask)
    cut(model, at=None)
    assert len(asked_whole) == 1


def test_the_collector_is_off_while_a_model_is_worked_on_and_on_again_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    opened = gates.open_model

    def spy(source: ModelSource, *given: Adjustments) -> ir.Model:
        seen.append(gc.isenabled())
        return opened(source, *given)

    for module in ("reports.checks", "reports.inspections", "partitions"):
        monkeypatch.setattr(f"splitonnx.partitioner.{module}.open_model", spy)
    model = ZOO["chain"].build()
    for verb in (check, inspect, partial(cut, at=None)):
        verb(model)
        assert gc.isenabled()
        with pytest.raises(NotAModel):
            verb(b"no model")
        assert gc.isenabled()
    assert seen == [False] * 6


def test_the_collector_stays_as_its_owner_set_it_whatever_pauses_overlap() -> None:
    begun, over = Barrier(2), Barrier(2)

    def pause() -> None:
        with pause_collection():
            begun.wait()
            over.wait()

    thread = Thread(target=pause)
    thread.start()
    with pause_collection():
        begun.wait()
    assert not gc.isenabled()
    over.wait()
    thread.join()
    assert gc.isenabled()
    gc.disable()
    try:
        with pause_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def build_lowered(last: str) -> ir.Graph:
    """A hundred ReluGrad, each an output, and behind them one node more."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    nodes = [ir.node("ReluGrad", [x, x], domain="com.microsoft", name=f"n{i}") for i in range(100)]
    nodes.append(ir.node(last, [x], domain="com.microsoft", name="last"))
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"v{index}"
        node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    outputs = [node.outputs[0] for node in reversed(nodes)]
    return ir.Graph([x], [*outputs, x], nodes=nodes, name="g", opset_imports={"": 18})


def test_lowering_keeps_the_outputs_of_a_graph_in_their_order() -> None:
    graph = build_lowered("QuickGelu")
    names = [value.name for value in graph.outputs]
    lower(graph)
    assert [value.name for value in graph.outputs] == names
    assert all(
        value.producer() is None or value.producer() in set(graph) for value in graph.outputs
    )
    assert not any(node.domain for node in graph)


def test_a_graph_that_cannot_be_lowered_has_its_outputs_still() -> None:
    graph = build_lowered("Unheard")
    names = [value.name for value in graph.outputs]
    with pytest.raises(UnsupportedModel, match="no counterpart in standard operators"):
        lower(graph)
    assert [value.name for value in graph.outputs] == names
    assert "Outputs" not in {node.op_type for node in graph}


def test_a_long_list_of_cuts_is_printed_as_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = inspect(ZOO["chain"].build())
    print_cuts(found)
    short = capsys.readouterr().out
    monkeypatch.setattr("splitonnx.commands.printing.FEW_ROWS", 1)
    print_cuts(found)
    long = capsys.readouterr().out
    assert [row.split() for row in long.splitlines() if "---" not in row] == [
        row.split() for row in short.splitlines() if row.strip() and "\u2500" not in row
    ]
    assert len({row.index(" N x ") for row in long.splitlines()[2:]}) == 1
