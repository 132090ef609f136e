"""What a stored tensor is, told by its uses: a parameter, a constant, a setting or a statistic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from splitonnx.partitioner.normalization.parameters import (
    Classification,
    TensorKind,
    classify_tensor,
    find_input_scalings,
)

P, C = TensorKind.PARAMETER, TensorKind.CONSTANT
S, T = TensorKind.SETTING, TensorKind.STATISTIC
ROW = np.array([0.5, -1.5, 2.25], np.float32)


def classify(
    array: np.ndarray, *nodes: onnx.NodeProto, literal: bool = False, opset: int = 18
) -> Classification:
    """Classify the float tensor ``w`` that ``nodes`` read, an initializer or a Constant node."""
    tensor = numpy_helper.from_array(array, "w")
    made = list(nodes)
    if literal:
        made.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    known = {"w", *(name for node in made for name in node.output)}
    reads = dict.fromkeys(name for node in nodes for name in node.input if name not in known)
    graph = helper.make_graph(
        made, "g", [onnx.ValueInfoProto(name=name) for name in reads if name],
        [onnx.ValueInfoProto(name=made[-1].output[0])] if made else [],
        [] if literal else [tensor],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    read = ir.from_proto(model)
    value = read.graph[0].outputs[0] if literal else read.graph.initializers["w"]
    stored = ir.convenience.get_const_tensor(value)
    assert stored is not None
    return classify_tensor(value, stored)


def use(kind: str, place: int, count: int = 2, **attributes: Any) -> onnx.NodeProto:
    inputs = [f"x{index}" for index in range(count)]
    inputs[place] = "w"
    return helper.make_node(kind, inputs, ["y"], name="node", **attributes)


PLACES = [
    ("Conv", 1, 3, P), ("Conv", 2, 3, P), ("MatMul", 1, 2, P), ("Gather", 0, 2, P),
    ("LSTM", 1, 8, P), ("LSTM", 5, 8, C), ("PRelu", 1, 2, P), ("LayerNormalization", 2, 3, P),
    ("BatchNormalization", 1, 5, P), ("BatchNormalization", 3, 5, T),
    ("BatchNormalization", 4, 5, T), ("Clip", 1, 3, C), ("Resize", 2, 3, S), ("Pad", 2, 3, S),
    ("Dropout", 1, 3, S), ("Mod", 1, 2, S), ("OneHot", 2, 3, C), ("Pow", 1, 2, C),
    ("Attention", 3, 4, C), ("GridSample", 1, 2, C),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "place", "count", "expected"), PLACES)
def test_the_place_tells_what_an_initializer_is(
    kind: str, place: int, count: int, expected: TensorKind
) -> None:
    assert classify(ROW, use(kind, place, count)).kind is expected


@pytest.mark.parametrize("kind", ["Conv", "MatMul", "Gather"])
def test_a_literal_in_a_place_for_weights_is_a_parameter(kind: str) -> None:
    place = 0 if kind == "Gather" else 1
    assert classify(ROW, use(kind, place), literal=True).kind is P


@pytest.mark.parametrize(
    ("kind", "array", "literal", "expected"),
    [
        ("Add", ROW, False, P),
        ("Add", ROW, True, P),
        ("Mul", ROW, True, P),
        ("Div", ROW, False, P),
        ("Div", ROW, True, C),
        ("Where", ROW, True, C),
        ("Add", ROW[:1], False, C),
        ("Mul", ROW[:1], False, C),
        ("Add", np.array([0.0, -np.inf], np.float32), False, C),
        ("Mul", np.arange(4, dtype=np.float32), False, C),
        ("Mul", np.ones(4, np.float32), False, P),
        ("Add", np.zeros(4, np.float32), False, P),
        ("Sin", ROW, True, C),
        ("Sin", ROW, False, P),
    ],
)
def test_what_is_only_calculated_with_is_told_by_its_numbers(
    kind: str, array: np.ndarray, literal: bool, expected: TensorKind
) -> None:
    node = use(kind, 0, 1) if kind == "Sin" else use(kind, 1, 3 if kind == "Where" else 2)
    assert classify(array, node, literal=literal).kind is expected


def test_a_scalar_is_a_constant_wherever_it_stands() -> None:
    for kind in ("Add", "MatMul", "PRelu"):
        assert classify(np.array(0.5, np.float32), use(kind, 1)).kind is C


def test_the_bias_of_a_layer_with_one_output_is_a_parameter() -> None:
    layer = helper.make_node("MatMul", ["x", "v"], ["h"])
    assert classify(ROW[:1], layer, helper.make_node("Add", ["h", "w"], ["y"])).kind is P
    assert classify(ROW[:1], layer, helper.make_node("Add", ["w", "h"], ["y"])).kind is P
    assert classify(ROW[:1], layer, helper.make_node("Mul", ["h", "w"], ["y"])).kind is C


def test_a_weight_comes_to_its_place_through_changes_of_shape() -> None:
    turned = helper.make_node("Transpose", ["w"], ["t"])
    cast = helper.make_node("Cast", ["t"], ["c"], to=onnx.TensorProto.FLOAT16)
    assert classify(ROW, turned, cast, helper.make_node("MatMul", ["x", "c"], ["y"])).kind is P
    pad = helper.make_node("Pad", ["x", "pads", "c"], ["y"], name="padded")
    found = classify(ROW, turned, cast, pad)
    assert found.kind is S
    assert "'padded' (Pad)" in found.reason


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (helper.make_node("LSTM", ["x", "t", "r"], ["", "y"]), P),
        (helper.make_node("GRU", ["x", "v", "t"], ["", "y"]), P),
        (helper.make_node("LSTM", ["x", "v", "r", "", "", "t"], ["", "y"]), C),
        (helper.make_node("Exp", ["t"], ["y"]), C),
    ],
)
def test_a_literal_whose_gates_are_reordered_for_a_recurrent_layer_is_a_parameter(
    last: onnx.NodeProto, expected: TensorKind
) -> None:
    pieces = [
        helper.make_node("Slice", ["w", start, end], [f"p{start}"])
        for start, end in (("0", "1"), ("1", "2"), ("2", "3"))
    ]
    joined = helper.make_node("Concat", ["p0", "p2", "p1"], ["j"], axis=0)
    turned = helper.make_node("Unsqueeze", ["j", "axes"], ["t"])
    assert classify(ROW, *pieces, joined, turned, last, literal=True).kind is expected


def test_what_is_cast_to_integers_is_no_parameter_by_that() -> None:
    cast = helper.make_node("Cast", ["w"], ["c"], to=onnx.TensorProto.INT64)
    gather = helper.make_node("Gather", ["x", "c"], ["y"])
    assert classify(ROW, cast, gather).kind is S
    assert classify(ROW, cast, gather, helper.make_node("MatMul", ["z", "w"], ["m"])).kind is P
    old = helper.make_node("Cast", ["w"], ["c"], to="FLOAT16")
    assert classify(ROW, old, helper.make_node("MatMul", ["x", "c"], ["y"]), opset=5).kind is P


def test_a_setting_anywhere_is_a_setting_and_a_statistic_must_be_one_everywhere() -> None:
    matmul, mod = use("MatMul", 1), helper.make_node("Mod", ["z", "w"], ["k"])
    assert classify(ROW, mod, matmul).kind is S
    norm = use("BatchNormalization", 3, 5)
    assert classify(ROW, helper.make_node("Add", ["z", "w"], ["k"]), norm).kind is P
    reason = classify(ROW, norm).reason
    assert "running statistic" in reason


def test_what_is_only_looked_at_cannot_be_trained_and_hinders_nothing() -> None:
    look = helper.make_node("Shape", ["w"], ["s"])
    assert classify(ROW, look) == Classification(
        kind=S, reason="nothing that has a gradient uses it"
    )
    assert classify(ROW, look, use("MatMul", 1)).kind is P


def scale(*nodes: onnx.NodeProto, **weights: np.ndarray) -> list[str]:
    """List what only normalizes the raw input ``x``, of nodes that read it and ``weights``."""
    inputs = {"x": [2, 3], **{name: list(array.shape) for name, array in weights.items()}}
    graph = helper.make_graph(
        list(nodes), "g",
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in inputs.items()
        ],
        [onnx.ValueInfoProto(name=nodes[-1].output[0])],
        [numpy_helper.from_array(np.array(255, np.float32), "scalar")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    tensors = {name: ir.tensor(array) for name, array in weights.items()}
    return find_input_scalings(ir.from_proto(model).graph, tensors)


def do(kind: str, *inputs: str, out: str) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), [out])


LAYER = np.ones((3, 2), np.float32)


def test_what_only_normalizes_a_raw_input_is_found_behind_scalars_and_moves() -> None:
    chain = [
        do("Div", "x", "scalar", out="a"), do("Clip", "a", "", "scalar", out="b"),
        do("Sub", "b", "mean", out="c"), do("Div", "c", "std", out="d"),
        do("MatMul", "d", "w", out="y"),
    ]  # fmt: skip
    assert scale(*chain, mean=ROW, std=ROW, w=LAYER) == ["mean", "std"]


def test_what_is_used_behind_a_weight_or_used_again_is_not_found() -> None:
    behind = [do("MatMul", "x", "w", out="h"), do("Sub", "h", "mean", out="y")]
    assert scale(*behind, mean=ROW[:2], w=LAYER) == []
    again = [
        do("Sub", "x", "mean", out="c"), do("MatMul", "c", "w", out="h"),
        do("MatMul", "mean", "w", out="m"), do("Add", "h", "m", out="y"),
    ]  # fmt: skip
    assert scale(*again, mean=ROW, w=LAYER) == []


def test_a_model_that_only_scales_and_shifts_its_input_is_trained() -> None:
    chain = [do("Mul", "x", "gain", out="s"), do("Add", "s", "shift", out="y")]
    assert scale(*chain, gain=ROW, shift=ROW) == []


def test_a_formula_of_the_input_is_not_its_normalization() -> None:
    """LayerNormalization written out on a raw input: its gain is learned."""
    chain = [
        do("ReduceMean", "x", out="m"), do("Sub", "x", "m", out="c"),
        do("Mul", "c", "gain", out="g"), do("MatMul", "g", "w", out="y"),
    ]  # fmt: skip
    assert scale(*chain, gain=ROW, w=LAYER) == []


NORMALIZED = [do("Sub", "xt", "mean", out="c"), do("Div", "c", "std", out="d")]
WEIGHTS = {"mean": ROW, "std": ROW, "w": LAYER}


def declare(name: str, kind: int = onnx.TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, None)


def repeat(kind: str, *nodes: onnx.NodeProto) -> onnx.NodeProto:
    """Run nodes in each step of a Loop or Scan: they read ``xt`` and ``h``, and make ``next``."""
    carried, results = [declare("h")], [declare("next"), declare("out")]
    whole = [*nodes, do("Identity", "next", out="out")]
    if kind == "Scan":
        body = helper.make_graph(whole, "body", [*carried, declare("xt")], results)
        inputs = ["first", "x"]
        return helper.make_node(kind, inputs, ["last", "y"], body=body, num_scan_inputs=1)
    number, going = declare("i", onnx.TensorProto.INT64), declare("go", onnx.TensorProto.BOOL)
    going_on = declare("on", onnx.TensorProto.BOOL)
    whole = [do("Cast", "i", out="at"), do("Gather", "x", "at", out="xt"),
             do("Identity", "go", out="on"), *whole]  # fmt: skip
    whole[0].attribute.append(helper.make_attribute("to", onnx.TensorProto.INT32))
    body = helper.make_graph(whole, "body", [number, going, *carried], [going_on, *results])
    return helper.make_node(kind, ["count", "", "first"], ["last", "y"], body=body)


@pytest.mark.parametrize("kind", ["Loop", "Scan"])
def test_what_normalizes_a_raw_input_in_each_step_is_found_as_before_all_steps(kind: str) -> None:
    layer = [do("MatMul", "d", "w", out="m"), do("Add", "m", "h", out="next")]
    assert scale(repeat(kind, *NORMALIZED, *layer), **WEIGHTS) == ["mean", "std"]
    before = [do("Identity", "x", out="xt"), *NORMALIZED, do("MatMul", "d", "w", out="y")]
    assert scale(*before, **WEIGHTS) == ["mean", "std"]


@pytest.mark.parametrize("kind", ["Loop", "Scan"])
def test_what_normalizes_in_steps_counts_where_a_weight_comes_after_them(kind: str) -> None:
    steps = repeat(kind, *NORMALIZED, do("Add", "d", "h", out="next"))
    assert scale(steps, do("MatMul", "y", "w", out="z"), **WEIGHTS) == ["mean", "std"]
    assert scale(steps, mean=ROW, std=ROW) == []


@pytest.mark.parametrize("kind", ["Loop", "Scan"])
def test_what_scales_hidden_numbers_in_steps_is_not_found(kind: str) -> None:
    hidden = [do("MatMul", "xt", "w", out="m"), do("Sub", "m", "mean", out="c"),
              do("MatMul", "c", "w", out="k"), do("Add", "k", "h", out="next")]  # fmt: skip
    assert scale(repeat(kind, *hidden), mean=ROW[:2], w=LAYER) == []
    carried = [do("Sub", "h", "mean", out="c"), do("MatMul", "c", "w", out="m"),
               do("Add", "m", "xt", out="next")]  # fmt: skip
    start = do("Identity", "x", out="first")
    assert scale(start, repeat(kind, *carried), mean=ROW, w=LAYER) == []


def test_what_normalizes_a_raw_input_in_a_branch_is_found() -> None:
    then = helper.make_graph(
        [do("Identity", "x", out="xt"), *NORMALIZED], "then", [], [declare("d")]
    )
    other = helper.make_graph([do("Identity", "x", out="e")], "else", [], [declare("e")])
    choice = helper.make_node("If", ["flag"], ["z"], then_branch=then, else_branch=other)
    assert scale(choice, do("MatMul", "z", "w", out="y"), **WEIGHTS) == ["mean", "std"]
    assert scale(choice, mean=ROW, std=ROW) == []
