"""Gradients through Ifs, against differences of the model in float64."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from tests.partitioner.differentiation.control_flow.loop_models import write_if
from tests.partitioner.differentiation.control_flow.scan_models import hold_gradients
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import draw_labels, hold_steps

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


_HOLDING = """
<ir_version: 9, opset_import: ["" : 18]>
branches (float[N, 3] x, bool c) => (float[N, 2] y)
{
    h = Tanh (x)
    e = If (c) <
        then_branch = one () => (float[N, 3] e1) { e1 = MatMul (h, FIRST) },
        else_branch = two () => (float[N, 3] e2) { k = Mul (h, h)  e2 = MatMul (k, SECOND) }
    >
    y = MatMul (e, w)
}
"""


def hold_weights(first: str, second: str, *, inside: bool) -> onnx.ModelProto:
    """Write an If whose branches read weights, which they hold themselves if ``inside``."""
    model = onnx.parser.parse_model(_HOLDING.replace("FIRST", first).replace("SECOND", second))
    choice = next(node for node in model.graph.node if node.op_type == "If")
    bodies = {attribute.name: attribute.g for attribute in choice.attribute}
    random = np.random.default_rng(0)
    for name, body, width in (
        (first, bodies["then_branch"], 3),
        (second, bodies["else_branch"], 3),
        ("w", model.graph, 2),
    ):
        weights = random.standard_normal((3, width), np.float32)
        holder = body if inside else model.graph
        holder.initializer.append(numpy_helper.from_array(weights, name))
    return model


@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("names", [("u", "v"), ("u", "u")])
def test_weights_that_both_branches_hold_are_trained(
    names: tuple[str, str], condition: bool
) -> None:
    held, apart = hold_weights(*names, inside=True), hold_weights("u", "v", inside=False)
    random = np.random.default_rng(3)
    data = {"x": random.standard_normal((4, 3), np.float32), "c": np.array(condition)}
    given = {**data, "labels": draw_labels(apart, data)}
    prepared = prepare(open_model(held))
    (other,) = [name for name in prepared.trainable if name not in ("u", "w")]
    steps = []
    for target in TARGETS:
        found = run_step(cut_prepared(prepared, at=None, loss="mse", client_target=target), given)
        steps.append({**found, "v_grad": found[f"{other}_grad"]})
        assert found["u_grad"].any() == condition
        assert found[f"{other}_grad"].any() != condition
    hold_steps(steps, apart, "mse", given, ["u", "v", "w"])
