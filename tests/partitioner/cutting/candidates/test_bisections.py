"""The list of a graph's cuts is what dividing at each tensor gives, in work linear in its nodes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.cutting.candidates import bisections
from splitonnx.partitioner.cutting.candidates.bisections import find_bisections
from splitonnx.partitioner.inference.folds import note_shapes
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.partitioner.reports.remarks import Kind

FLOAT, INT64 = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
Values = list[ir.Value]


def build_random(choice: random.Random) -> tuple[ir.Graph, Values, Values]:
    """Build a graph of data, weights, sizes and noise; give its data and weights too."""
    lengths: list[int | str] = ["T", "S", 4]
    data = [
        ir.Value(name=f"x{i}", type=FLOAT, shape=ir.Shape(["N", choice.choice(lengths)]))
        for i in range(choice.choice([1, 1, 2]))
    ]
    weights = [ir.Value(name=f"w{i}", type=FLOAT, shape=ir.Shape([1])) for i in range(3)]
    values, constants = [*data], [*weights]
    sizes: Values = []
    nodes = []
    for index in range(choice.randint(4, 16)):
        value = values[-1] if choice.random() < 0.75 else choice.choice(values)
        kinds = {"Relu": 7, "Add": 9, "Shape": 2, "RandomNormalLike": 1, "Neg": 1}
        if sizes:
            kinds |= {"Mul": 2, "Expand": 2}
        kind = choice.choices([*kinds], [*kinds.values()])[0]
        inputs, row = [value], values
        if kind == "Add":
            inputs.append(choice.choice([*constants, *values]))
        elif kind == "Neg":
            inputs, row = [choice.choice(constants)], constants
        elif kind == "Expand":
            inputs.append(choice.choice(sizes))
        elif kind == "Mul":
            inputs, row = choice.choices(sizes, k=2), sizes
        elif kind == "Shape":
            row = sizes
        node = ir.node(kind, inputs, name=f"n{index}")
        (output,) = node.outputs
        output.name, output.type = f"v{index}", INT64 if row is sizes else FLOAT
        nodes.append(node)
        row.append(output)
    outputs = dict.fromkeys([values[-1], choice.choice(values)])
    made = [value for value in outputs if value.producer() is not None]
    return ir.Graph([*data, *weights], made, nodes=nodes, opset_imports={"": 18}), data, weights


@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_the_list_is_what_dividing_at_each_tensor_gives(
    seed: int, sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = random.Random(seed)
    graph, data, weights = build_random(choice)
    note_shapes(graph)
    state = {value.name or "" for value in weights}
    trained = {name: 3 for name in sorted(state) if choice.random() < 0.8}
    beside = data if sent else []
    found = find_bisections(graph, state=state, trainable=trained, sent=beside)
    monkeypatch.setattr(bisections._Server, "classify", lambda server, place: None)  # divide judges
    assert found == find_bisections(graph, state=state, trainable=trained, sent=beside)


def test_a_list_that_would_take_too_many_walks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = (ir.Value(name=n, type=FLOAT, shape=ir.Shape(["N", 4])) for n in ("x", "mask"))
    first = ir.node("Relu", [x], name="first")
    second = ir.node("Mul", [first.outputs[0], mask], name="second")
    for node in (first, second):
        node.outputs[0].name, node.outputs[0].type = node.name, FLOAT
    graph = ir.Graph(
        [x, mask], second.outputs, nodes=[first, second], opset_imports={"": 18}, name="masked"
    )
    assert len(find_bisections(graph, state=(), trainable={}, sent=[mask])) == 1
    monkeypatch.setattr(bisections, "MOST_VISITS", 1)
    with pytest.raises(UnsupportedModel, match="cut at a tensor by its name"):
        find_bisections(graph, state=(), trainable={}, sent=[mask])


def test_a_model_whose_cuts_are_too_many_to_be_tried_is_checked_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bisections._Server, "classify", lambda server, place: None)
    monkeypatch.setattr(bisections, "MOST_VISITS", 1)
    found = check(build_chain(9))
    assert found.trainable
    assert not found.cuts
    (remark,) = found.remarks
    assert remark.kind is Kind.CUTS_NOT_LISTED
    assert "cut at a tensor by its name" in remark.sentence


def build_chain(nodes: int) -> bytes:
    """Build MatMul, Add and Relu in a row, each with its own weights."""
    made, weights, last = [], [], "x"
    for index in range(nodes):
        name = f"v{index}"
        if index % 3 == 2:
            made.append(helper.make_node("Relu", [last], [name]))
        else:
            shape, kind = ((4, 4), "MatMul") if index % 3 == 0 else ((4,), "Add")
            weights.append(numpy_helper.from_array(np.full(shape, 0.1, np.float32), f"w{index}"))
            made.append(helper.make_node(kind, [last, f"w{index}"], [name]))
        last = name
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in ("x", last)]
    graph = helper.make_graph(made, "chain", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def count_calls(work: Callable[[], object]) -> int:
    """Count the calls of functions, Python's own among them, that some work takes."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


VERBS: dict[str, Callable[[bytes], object]] = {
    "check": lambda content: check(content, loss="mse"),
    "cut": lambda content: cut(content, at="v8", loss="mse"),
    "inspect": inspect,
}


@pytest.mark.parametrize("verb", VERBS)
def test_work_grows_as_the_nodes_do(verb: str) -> None:
    short, long = (build_chain(nodes) for nodes in (30, 240))
    VERBS[verb](short)  # what is done once a process
    assert count_calls(lambda: VERBS[verb](long)) < 1.25 * 8 * count_calls(
        lambda: VERBS[verb](short)
    )


def test_every_tensor_of_a_chain_is_listed() -> None:
    found = inspect(build_chain(30))
    assert [each.tensor for each in found] == [f"v{index}" for index in range(29)]
    assert [each.client_parameters for each in found][:4] == [16, 20, 20, 36]
    assert found[-1].server_parameters == 0
