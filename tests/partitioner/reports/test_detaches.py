"""Sums from which a term vanishes: how a detach shows that the export lost."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.reports.detaches import remark_on_detaches
from splitonnx.partitioner.reports.remarks import Remark
from tests.support.nets import FLOAT, Net

Nodes = list[tuple[str, list[str], str]]


def list_remarks(nodes: Nodes, result: str, *, is_trained: bool = True) -> list[Remark]:
    """Put nodes behind ``z``, which depends on a weight, and ``q`` and ``r``, functions of it."""
    net = Net()
    if is_trained:
        net.op("MatMul", "x", net.weight("w", 4, 4), out="z")
    else:
        net.op("Exp", "x", out="z")
    net.op("Round", "z", out="q")
    net.op("Tanh", "z", out="r")
    net.constant("minus", np.array(-1, np.float32))
    net.constant("two", np.array(2, np.float32))
    for kind, inputs, output in nodes:
        net.op(kind, *inputs, out=output)
    output = net.op("MatMul", result, net.weight("w2", 4, 3), out="y")
    model: onnx.ModelProto = net.finish({"x": (FLOAT, ["N", 4])}, output, 3)
    return list(remark_on_detaches(prepare(open_model(model))))


LOST: dict[str, tuple[Nodes, str]] = {
    "z + (q - z)": ([("Sub", ["q", "z"], "e"), ("Add", ["z", "e"], "s")], "e"),
    "(q - z) + z": ([("Sub", ["q", "z"], "e"), ("Add", ["e", "z"], "s")], "e"),
    "z - (z - q)": ([("Sub", ["z", "q"], "e"), ("Sub", ["z", "e"], "s")], "e"),
    "z + (-z + q)": (
        [("Neg", ["z"], "n"), ("Add", ["n", "q"], "e"), ("Add", ["z", "e"], "s")],
        "e",
    ),
    "sum(z, q + (-z))": (
        [("Neg", ["z"], "n"), ("Add", ["q", "n"], "e"), ("Sum", ["z", "e"], "s")],
        "e",
    ),
    "q + z + (-1) z": (
        [("Mul", ["minus", "z"], "n"), ("Add", ["q", "z"], "a"), ("Add", ["a", "n"], "s")],
        "n",
    ),
    "sum(r, z, -z, q)": ([("Neg", ["z"], "n"), ("Sum", ["r", "z", "n", "q"], "s")], "n"),
    "z - (z / -1 + q) (-1)": (
        [
            ("Div", ["z", "minus"], "n"),
            ("Sum", ["n", "q"], "e"),
            ("Mul", ["e", "minus"], "o"),
            ("Sub", ["z", "o"], "s"),
        ],
        "e",
    ),
    "z + ((q - z) + r)": (
        [("Sub", ["q", "z"], "e"), ("Add", ["e", "r"], "o"), ("Add", ["z", "o"], "s")],
        "e",
    ),
    "(z + r) + (q - z), through Identity": (
        [
            ("Add", ["z", "r"], "a"),
            ("Sub", ["q", "z"], "d"),
            ("Identity", ["d"], "e"),
            ("Add", ["a", "e"], "s"),
        ],
        "d",
    ),
}


@pytest.mark.parametrize("formula", LOST)
def test_the_tensor_that_was_detached_is_named(formula: str) -> None:
    nodes, detached = LOST[formula]
    (remark,) = list_remarks(nodes, "s")
    assert remark.names == ("s", "z")
    assert remark.options == (f"--stop-gradient {detached}",)


def test_where_no_tensor_holds_what_was_detached_no_option_is_offered() -> None:
    (remark,) = list_remarks([("Add", ["z", "q"], "a"), ("Sub", ["a", "z"], "s")], "s")
    assert remark.options == ()
    assert "no tensor holds" in remark.sentence


KEPT: dict[str, Nodes] = {
    "a skip connection": [("Add", ["z", "r"], "s")],
    "two of one": [("Add", ["z", "z"], "s")],
    "a difference": [("Sub", ["q", "z"], "e"), ("Sub", ["e", "z"], "s")],
    "an interpolation": [
        ("Sub", ["q", "z"], "e"),
        ("Mul", ["r", "e"], "p"),
        ("Add", ["z", "p"], "s"),
    ],
    "twice as much": [("Mul", ["z", "two"], "t"), ("Sub", ["t", "z"], "s")],
    "one by z": [("Div", ["minus", "z"], "i"), ("Sub", ["i", "z"], "s")],
    "zeros like z": [("Sub", ["z", "z"], "s")],
}


@pytest.mark.parametrize("formula", KEPT)
def test_other_sums_call_for_no_remark(formula: str) -> None:
    assert list_remarks(KEPT[formula], "s") == []


def test_what_no_parameter_comes_before_has_no_gradient_to_lose() -> None:
    assert list_remarks(LOST["z + (q - z)"][0], "s", is_trained=False) == []
