"""Sequences of known length: their tensors train as if no sequence had been there."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx.errors import ModelError
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import assert_differentiable, close_net, draw_labels, take_step
from tests.support.zoo import Net

DATA = {"x": np.random.default_rng(0).standard_normal((3, 4, 5), np.float32)}


def place(net: Net, name: str, value: object) -> str:
    return net.constant(name, np.array(value, np.int64))


def start() -> tuple[Net, list[str]]:
    net = Net()
    names = [net.op("Mul", "x", net.weight(f"w{i}", 4, 5), out=f"h{i}") for i in range(3)]
    return net, names


def hold(net: Net, plain: Net | None = None) -> None:
    """Check gradients, and that nothing of a sequence is left in the merged model.

    ``plain`` is the same model without sequences, where onnx's own evaluator cannot run it.
    """
    if plain is None:
        assert_differentiable(net, DATA)
    else:
        expected = take_step(close_net(plain, DATA), DATA)
        labels = draw_labels(close_net(plain, DATA), DATA)
        model = close_net(net, DATA)
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, [None] * 3))
        for target, known in zip(TARGETS, expected, strict=True):
            bundle = cut(model, at=None, loss="mse", client_target=target)
            found = run_step(bundle, {**DATA, "labels": labels})
            assert found.keys() == known.keys()
            for name, array in known.items():
                np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-7)
        return
    merged = onnx.load_from_string(merge(cut(close_net(net, DATA), at=None, loss="mse")))
    kinds = {node.op_type for node in merged.graph.node}
    assert not {kind for kind in kinds if "Sequence" in kind or "Optional" in kind}


def test_a_row_that_is_built_changed_and_joined() -> None:
    net, names = start()
    net.op("SequenceConstruct", *names, out="s0")
    net.op("SequenceInsert", "s0", "x", place(net, "front", 0), out="s1")
    net.op("SequenceInsert", "s1", names[1], out="s2")
    net.op("SequenceErase", "s2", place(net, "second", -3), out="s3")
    net.op("Identity", "s3", out="s4")
    net.op("ConcatFromSequence", "s4", out="y", axis=2)
    hold(net)


def test_a_row_that_starts_empty_is_stacked() -> None:
    net, names = start()
    net.op("SequenceEmpty", out="s0")
    for index, name in enumerate(names):
        net.op("SequenceInsert", f"s{index}", name, out=f"s{index + 1}")
    net.op("ConcatFromSequence", "s3", out="stack", axis=-1, new_axis=1)
    net.op("Reshape", "stack", place(net, "flat", [-1, 60]), out="y")
    hold(net)


def test_elements_by_place_and_the_length() -> None:
    net, names = start()
    net.op("SequenceConstruct", *names, out="s")
    last = net.op("SequenceAt", "s", place(net, "last", -1), out="last_one")
    net.op("Cast", net.op("SequenceLength", "s", out="n"), out="count", to=TensorProto.FLOAT)
    net.op("Mul", last, "count", out="y")
    hold(net)


@pytest.mark.parametrize(
    ("extents", "attributes"),
    [
        (None, {"axis": 1}),
        (None, {"axis": 1, "keepdims": 0}),
        (3, {"axis": 2}),
        ([1, 3], {"axis": -2}),
    ],
)
def test_pieces_of_a_tensor(extents: object, attributes: dict[str, Any]) -> None:
    net, names = start()
    given = [] if extents is None else [place(net, "extents", extents)]
    net.op("SplitToSequence", names[0], *given, out="s", **attributes)
    first = net.op("SequenceAt", "s", place(net, "first", 0), out="first_one")
    second = net.op("SequenceAt", "s", place(net, "second", 1), out="second_one")
    if extents is None:
        net.op("Mul", first, second, out="y")
    else:
        axis = attributes["axis"]
        net.op("Concat", second, first, out="y", axis=axis)
    hold(net)


def test_a_body_that_is_mapped_over_a_row() -> None:
    net, names = start()
    net.op("SequenceConstruct", *names, out="s")
    value = helper.make_tensor_value_info
    half = helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])
    body = helper.make_graph(
        [helper.make_node("Mul", ["a", "b"], ["c"]), helper.make_node("Mul", ["c", "half"], ["d"])],
        "body",
        [value("a", TensorProto.FLOAT, None), value("b", TensorProto.FLOAT, None)],
        [value("d", TensorProto.FLOAT, None)],
        [half],
    )
    net.op("SequenceMap", "s", "x", out="t", body=body)
    net.op("ConcatFromSequence", "t", out="y", axis=1)
    hold(net)


def test_a_list_that_a_loop_fills() -> None:
    net, names = start()
    net.op("SequenceEmpty", out="empty")
    value = helper.make_tensor_value_info
    sequence = helper.make_tensor_sequence_value_info
    body = helper.make_graph(
        [
            helper.make_node("Tanh", ["h"], ["h_next"]),
            helper.make_node("SequenceInsert", ["s", "h_next"], ["s_next"]),
            helper.make_node("Identity", ["go"], ["go_next"]),
        ],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("h", TensorProto.FLOAT, [None, 4, 5]),
            sequence("s", TensorProto.FLOAT, None),
        ],
        [
            value("go_next", TensorProto.BOOL, []),
            value("h_next", TensorProto.FLOAT, [None, 4, 5]),
            sequence("s_next", TensorProto.FLOAT, None),
        ],
    )
    net.nodes.append(
        helper.make_node("Loop", [place(net, "trips", 3), "", names[0], "empty"], ["last", "all"],
                         name="loop", body=body)
    )  # fmt: skip
    net.op("ConcatFromSequence", "all", out="y", axis=1)
    plain, (name, *_) = start()
    states = [name]
    for index in range(3):
        states.append(plain.op("Tanh", states[-1], out=f"state{index}"))
    plain.op("Concat", *states[1:], out="y", axis=1)
    hold(net, plain)


def test_optionals_that_hold_something() -> None:
    net, names = start()
    net.op("Optional", names[0], out="o")
    net.op("OptionalGetElement", "o", out="held")
    full = net.op("Cast", net.op("OptionalHasElement", "o", out="has"), out="has_float", to=1)
    net.op("Mul", "held", full, out="y")
    plain, (name, *_) = start()
    plain.op("Identity", name, out="y")
    hold(net, plain)


def test_the_parts_of_a_row_can_be_cut() -> None:
    net, names = start()
    net.op("SequenceConstruct", *names, out="s")
    net.op("ConcatFromSequence", "s", out="joined", axis=2)
    net.op("MatMul", "joined", net.weight("v", 15, 2), out="y")
    assert [found.tensor for found in inspect(close_net(net, DATA))] == ["joined"]


def test_a_place_that_is_data_is_refused_by_name() -> None:
    net, names = start()
    net.op("SequenceConstruct", *names, out="s")
    net.op("SequenceAt", "s", "which", out="y")
    data = {**DATA, "which": np.array([1])}
    with pytest.raises(ModelError, match=r"'s_node' \(SequenceConstruct\)"):
        cut(close_net(net, data), at=None, loss="mse")
