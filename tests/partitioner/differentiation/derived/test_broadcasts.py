"""Operands that are repeated along an axis of which no size is known before the run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from splitonnx.partitioner.differentiation.derived.broadcasts import supply_broadcasts
from splitonnx.partitioner.differentiation.derived.opaques import (
    put_back_opaques,
    take_out_opaques,
)
from splitonnx.partitioner.graphs.builders import HIDDEN
from tests.support.derivatives import assert_differentiable, close_net
from tests.support.differentiations import hold_gradients
from tests.support.zoo import Net

KINDS = (
    *("Add", "Div", "Einsum", "Expand", "MatMul", "Max", "Min", "Mul", "Pow", "PRelu", "Sub"),
    *("Sum", "Where"),
)
DATA = {"x": 0.5 + np.random.default_rng(0).random((3, 4, 5), np.float32)}


def build(kind: str, rows: int) -> Net:
    """An operator on all samples of a batch and on the first ones, however many there are."""
    net = Net()
    start, axis = (net.constant(name, np.array([0])) for name in ("start", "axis"))
    all_rows = net.op("MatMul", "x", net.weight("w", 5, 5), out="all")
    few = net.op("Slice", "all", start, net.constant("end", np.array([rows])), axis, out="few")
    if kind in ("Div", "Max", "Min", "Sum"):
        few = net.op("Sigmoid", few, out="sigmoid")
    if kind == "Pow":
        all_rows = net.op("Exp", all_rows, out="positive")
    if kind == "Where":
        net.op("Greater", "x", net.constant("one", np.array(1, np.float32)), out="choice")
    if kind == "Expand":
        net.op("Shape", "x", out="shape")
        few = net.op("Expand", few, "shape", out="expanded")
        kind = "Mul"
    if kind == "MatMul":
        few = net.op("Transpose", few, out="turned", perm=[0, 2, 1])
    operands = [*(["choice"] if kind == "Where" else []), all_rows, few]
    attributes = {"equation": "nij,nkj->nik"} if kind == "Einsum" else {}
    net.op(kind, *operands, out="u", **attributes)
    net.op("Tanh", "u", out="y")
    return net


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_summed_where_the_operand_was_repeated(kind: str, rows: int) -> None:
    assert_differentiable(build(kind, rows), DATA)


@pytest.mark.parametrize("repeated", [0, 1])
@pytest.mark.parametrize(
    "equation",
    ["ntd,ntd->ntd", "...d,...d->...d", "ntd,ntd->nd", "ntd,ntk->ndk", "ntd,ntk->ntk",
     "ntdd,ntd->nt", "ntd,ntd,td->td"],
)  # fmt: skip
def test_either_operand_of_an_einsum_may_be_the_one_that_is_repeated(
    equation: str, repeated: int
) -> None:
    terms = equation.split("->")[0].replace("...", "nt").split(",")
    sizes = {"n": 2, "d": 3, "k": 4}
    draw = np.random.default_rng(3).standard_normal
    arrays = {
        f"x{index}": draw(
            [1 if label == "t" and index == repeated else sizes.get(label, 3) for label in term]
        ).astype(np.float32)
        for index, term in enumerate(terms)
    }
    hold_gradients(
        [helper.make_node("Einsum", list(arrays), ["y"], equation=equation)],
        arrays,
        ["y"],
        evaluate=lambda feeds: {"y": np.einsum(equation, *feeds.values())},
        dynamic={name: term.index("t") for name, term in zip(arrays, terms, strict=True)},
        entries=3,
    )


def test_several_axes_and_one_that_only_the_result_has_are_summed() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 5, 5), out="all")
    zeros = net.constant("zeros", np.zeros(2, np.int64))
    ends, axes = net.constant("ends", np.ones(2, np.int64)), net.constant("axes", np.arange(2))
    net.op("Slice", "all", zeros, ends, axes, out="few")
    net.op("Unsqueeze", "all", net.constant("first", np.array([0])), out="wide")
    net.op("Mul", "few", "wide", out="m")
    net.op("Tanh", "m", out="t")
    net.op("Squeeze", "t", "first", out="y")
    assert_differentiable(net, DATA)


def test_operands_of_one_symbol_or_of_fixed_sizes_are_not_copied() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 5, 5), out="h")
    net.op("Mul", "h", "x", out="m")
    net.op("Add", "m", net.weight("b", 4, 1), out="y")
    graph = ir.from_proto(close_net(net, DATA)).graph
    graph.inputs.extend(graph.initializers.values())
    assert not supply_broadcasts(graph, {"w", "b"}, {"y"}).results


def test_only_what_gets_a_gradient_is_copied() -> None:
    graph = ir.from_proto(close_net(build("Mul", 1), DATA)).graph
    graph.inputs.extend(graph.initializers.values())
    assert not supply_broadcasts(graph, set(), {"y"}).results
    supplied = supply_broadcasts(graph, {"w"}, {"y"})
    assert len(supplied.results) == len(supplied.arguments) == 2
    assert [node.outputs[0].name for node in graph if HIDDEN in node.metadata_props] == [
        *supplied.results
    ]


def test_what_was_known_of_an_operand_s_shape_is_kept() -> None:
    """The builder's graph declares it as an output, and outputs that stand for others go again."""
    graph = ir.from_proto(close_net(build("Mul", 1), DATA)).graph
    graph.inputs.extend(graph.initializers.values())
    supply_broadcasts(graph, {"w"}, {"y"})
    taken = take_out_opaques(graph)
    written = ir.to_proto(graph)
    before = {value.name: value.type for value in written.output}
    put_back_opaques(written, taken)
    after = {value.name: value.type for value in written.value_info}
    assert {"all", "few"} <= before.keys()
    assert [after[name] for name in ("all", "few")] == [before[name] for name in ("all", "few")]
