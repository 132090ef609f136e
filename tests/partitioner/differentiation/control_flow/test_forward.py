"""Gradients through Scans of all forms, against differences of the model in float64."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from splitonnx.partitioner.differentiation.control_flow.forward import supply_gradients
from splitonnx.partitioner.differentiation.gradients import differentiate
from splitonnx.partitioner.graphs.traversals import list_bodies
from tests.partitioner.differentiation.control_flow.scan_models import (
    hold_gradients,
    read,
    write_scan,
)

EVERY = ["s", "x", "w", "v", "p"]
STEPS = {
    "products": "m = Gemm <transB = 1> (a, w)  k = Gemm (b, v)  t = Add (m, k)  n = Tanh (t)  "
    "y = Mul (n, p)",
    "two products of the same weights": "m = Gemm (a, w)  k = Gemm (b, w, m)  n = Tanh (k)  "
    "g = Mul (n, p)  y = Gemm (g, v)",
    "weights that are also read otherwise": "m = Gemm (a, w)  k = ReduceSum (w)  q = Gemm (b, v)  "
    "t = Add (m, k)  n = Tanh (t)  r = Mul (q, p)  y = Add (r, n)",
    "a product of weights and weights": "o = MatMul (w, v)  m = Gemm (a, o)  t = Add (m, b)  "
    "n = Tanh (t)  y = Mul (n, p)",
    "a scaled product": "m = Gemm <alpha = 0.5> (a, w)  q = Gemm <transA = 1> (b, a)  "
    "t = Gemm (b, q)  k = Gemm (t, v)  u = Add (m, k)  n = Tanh (u)  y = Mul (n, p)",
    "a value read twice by a node": "m = Gemm (a, w)  q = Mul (m, m)  k = Mul (b, b)  "
    "t = Add (q, k)  n = Tanh (t)  h = Gemm (n, v)  u = Mul (p, p)  y = Mul (h, u)",
    "operators that have a rewrite": "m = Gemm (a, w)  t = Add (m, b)  q = Selu (t)  "
    "f = Floor (q)  d = Sub (q, f)  k = Gemm (d, v)  n = Softsign (k)  y = Mul (n, p)",
    "a state that no step reads": "m = Gemm (b, w)  k = Gemm (m, v)  n = Mul (k, p)  "
    "c = Mul (n, b)  y = Identity (c)",
    "numbers chosen by their signs": "z = Constant <value = float {0.0}> ()  f = Greater (b, z)  "
    "c = NonZero (f)  d = Transpose (c)  m = Gemm (a, w)  g = GatherND (m, d)  t = Exp (g)  "
    "r = ReduceSum <keepdims = 0> (t)  k = Gemm (b, v)  u = Add (k, r)  n = Tanh (u)  "
    "y = Mul (n, p)",
    "a state shown as it was": "m = Gemm (a, w)  k = Gemm (b, v)  t = Add (m, k)  q = Mul (t, p)  "
    "n = Tanh (q)  y = Identity (a)",
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_gradients_of_a_scan(step: str, backwards: bool) -> None:
    trained = [name for name in EVERY if name != "s" or "no step" not in step]
    hold_gradients(write_scan(STEPS[step], backwards=backwards), trained)


@pytest.mark.parametrize("length", [1, 2])
def test_gradients_of_a_short_scan(length: int) -> None:
    hold_gradients(write_scan(STEPS["products"]), EVERY, length=length)


@pytest.mark.parametrize("loss", [
    "loss = ReduceSumSquare <keepdims = 0> (last)",
    "loss = ReduceSumSquare <keepdims = 0> (rows)",
])  # fmt: skip
def test_only_one_result_is_used(loss: str) -> None:
    step = STEPS["a state shown as it was"]
    hold_gradients(write_scan(step, loss), EVERY)


@pytest.mark.parametrize("trained", ["s", "x", "w", "p"])
def test_only_one_value_is_trained(trained: str) -> None:
    joint, _ = hold_gradients(write_scan(STEPS["products"]), [trained])
    assert [node.op_type for node in joint.graph].count("Scan") == 2


def test_the_weights_of_products_are_multiplied_for_all_steps_at_once() -> None:
    joint, _ = hold_gradients(write_scan(STEPS["products"]), ["w"])
    (backward,) = (n for n in joint.graph if n.op_type == "Scan" and "gradient" in (n.name or ""))
    (body,) = list_bodies(backward)
    assert [node.op_type for node in body].count("Gemm") == 1  # to the state before
    values = {value.name: value for value in joint.graph.outputs}
    assert values["w_grad"].producer() is not None


SECOND = """
    end, more = Scan <num_scan_inputs = 1, body = other (float[N, 3] c, float[N, 3] d) =>
        (float[N, 3] e, float[N, 3] z) {
            m2 = Gemm (c, w)  t2 = Add (m2, d)  e = Tanh (t2)  z = Mul (e, p)
        }> (last, rows)
    total = ReduceSumSquare <keepdims = 0> (more)
    other = ReduceSumSquare <keepdims = 0> (last)
    loss = Add (total, other)
"""


def test_a_scan_reads_what_another_made_and_the_same_weights() -> None:
    model = write_scan(STEPS["products"], SECOND)
    joint, _ = hold_gradients(model, EVERY)
    assert [node.op_type for node in joint.graph].count("Scan") == 4


def test_equal_models_yield_equal_nodes() -> None:
    model = write_scan(STEPS["products"], SECOND)
    protos = [ir.to_proto(differentiate(read(model, EVERY), EVERY, "loss")) for _ in range(2)]
    first, second = ([node.SerializeToString() for node in p.graph.node] for p in protos)
    assert first == second


def test_a_scan_that_the_loss_does_not_read_stays_as_it_is() -> None:
    model = read(write_scan(STEPS["products"], "loss = ReduceSumSquare <keepdims = 0> (w)"), ["w"])
    model.graph.outputs.append(next(n for n in model.graph if n.op_type == "Scan").outputs[0])
    supplied = supply_gradients(model, ["w"], ["loss"])
    assert not supplied.nodes
    joint = differentiate(model, ["w"], "loss")
    assert [node.op_type for node in joint.graph].count("Scan") == 1
