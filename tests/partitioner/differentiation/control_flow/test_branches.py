"""Gradients through Ifs, against differences of the model in float64."""

from __future__ import annotations

import pytest

from tests.partitioner.differentiation.control_flow.loop_models import write_if
from tests.partitioner.differentiation.control_flow.scan_models import hold_gradients

EVERY = ["s", "w", "v", "p"]
PAIRS = {
    "weights of their own": (
        "m1 = MatMul (a, w)  y1 = Tanh (m1)  z1 = Mul (a, a)",
        "m2 = MatMul (a, v)  y2 = Sigmoid (m2)  z2 = Mul (m2, p)",
    ),
    "the same weights": (
        "m1 = MatMul (a, w)  k1 = MatMul (m1, w)  y1 = Tanh (k1)  z1 = Mul (a, p)",
        "m2 = Gemm <transB = 1> (a, w)  y2 = Selu (m2)  k2 = MatMul (m2, v)  z2 = Mul (k2, p)",
    ),
    "an output without a gradient": (
        "m1 = MatMul (a, w)  y1 = Tanh (m1)  f1 = Floor (a)  z1 = Mul (f1, p)",
        "m2 = MatMul (a, v)  y2 = Tanh (m2)  h2 = Shape (a)  o2 = ConstantOfShape (h2)  "
        "z2 = Identity (o2)",
    ),
    "a branch that reads nothing trained": (
        "m1 = MatMul (a, w)  k1 = MatMul (m1, v)  y1 = Tanh (k1)  z1 = Mul (a, p)",
        "h2 = Shape (a)  y2 = ConstantOfShape (h2)  z2 = Identity (y2)",
    ),
    "values passed on": (
        "y1 = Identity (a)  z1 = MatMul (a, w)",
        "y2 = MatMul (a, v)  z2 = Mul (a, p)",
    ),
}


@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_of_both_branches(pair: str, condition: bool) -> None:
    hold_gradients(write_if(*PAIRS[pair]), EVERY, condition=condition)


LOOP = """
    three = Constant <value_int = 3> ()
    y1, r1 = Loop <body = step (int64 i, bool on, float[N, 3] d) =>
        (bool off, float[N, 3] f, float[N, 3] j) {
            off = Identity (on)  g = MatMul (d, w)  h = Mul (g, p)  f = Tanh (h)  j = Mul (f, h)
    }> (three, , a)
    z1 = ReduceMean <keepdims = 0> (r1, axis)  axis = Constant <value_ints = [0]> ()
"""


@pytest.mark.parametrize("condition", [True, False])
def test_gradients_of_a_loop_in_a_branch(condition: bool) -> None:
    loop = "axis = Constant <value_ints = [0]> ()" + LOOP.replace(
        "axis = Constant <value_ints = [0]> ()\n", "\n"
    )
    hold_gradients(write_if(loop, PAIRS["weights of their own"][1]), EVERY, condition=condition)
