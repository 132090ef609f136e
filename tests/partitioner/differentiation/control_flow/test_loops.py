"""Gradients through Loops, against differences of the model in float64."""

from __future__ import annotations

import pytest

from tests.partitioner.differentiation.control_flow.loop_models import (
    STOPS,
    write_carrying,
    write_loop,
)
from tests.partitioner.differentiation.control_flow.scan_models import hold_gradients

EVERY = ["s", "x", "w", "v", "p"]
READ = "b = Gather (x, i)  "
STEPS = {
    "products": "m = MatMul (a, w)  k = Gemm (b, v)  t = Add (m, k)  n = Tanh (t)  y = Mul (n, p)",
    "nothing to keep": "k = ReduceSum (w)  q = ReduceSum (v)  t = Add (k, q)  u = Add (t, p)  "
    "z = Add (u, b)  n = Add (a, z)  y = Identity (n)",
    "operators that have a rewrite": "m = MatMul (a, w)  t = Add (m, b)  q = Selu (t)  "
    "k = MatMul (q, v)  n = Softsign (k)  y = Mul (n, p)",
    "a product in the middle of other readers": "k = ReduceSum (w)  m = MatMul (a, w)  "
    "u = Add (m, k)  j = MatMul (b, v)  t = Add (u, j)  n = Tanh (t)  y = Mul (n, p)",
    "a value of which only the shape is read": "h = Shape (w)  o = ConstantOfShape (h)  "
    "r = MatMul (b, v)  m = MatMul (a, o)  t = Add (m, r)  n = Tanh (t)  y = Mul (n, p)",
    "a mask computed inside": "m = MatMul (a, w)  f = Greater (m, b)  t = Where (f, m, b)  "
    "k = MatMul (t, v)  n = Tanh (k)  y = Mul (n, p)",
}


CARRIED = {
    "an index": (
        "int64 k",
        "int64 more",
        "one = Constant <value_int = 1> ()  more = Add (k, one)  b = Gather (x, k)  "
        "m = MatMul (a, w)  t = Add (m, b)  n = Tanh (t)",
        "zero",
    ),
    "two tensors that change places": (
        "float[N, 3] d",
        "float[N, 3] e",
        "n = MatMul (d, w)  u = Mul (a, p)  e = Tanh (u)",
        "s",
    ),
}


@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("carried", CARRIED)
def test_gradients_of_a_loop_that_carries_several_values(carried: str, most: int) -> None:
    hold_gradients(write_carrying(*CARRIED[carried]), ["s", "w"], most=most)


@pytest.mark.parametrize("step", STEPS)
def test_gradients_of_a_loop_of_given_length(step: str) -> None:
    hold_gradients(write_loop(READ + STEPS[step]), EVERY)


@pytest.mark.parametrize("most", [1, 2, 4])
def test_gradients_of_a_loop_that_stops_by_itself(most: int) -> None:
    hold_gradients(write_loop(READ + STEPS["products"], STOPS), EVERY, most=most)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("most", "condition"), [(0, True), (3, False)])
def test_gradients_of_a_loop_that_runs_no_iteration(step: str, most: int, condition: bool) -> None:
    hold_gradients(write_loop(READ + STEPS[step]), EVERY, most=most, condition=condition)


INNER = {
    "a loop": """
        three = Constant <value_int = 2> ()
        e = Loop <body = inner (int64 j, bool on, float[N, 3] d) => (bool off, float[N, 3] f) {
            off = Identity (on)  g = MatMul (d, w)  h = Add (g, b)  f = Tanh (h)
        }> (three, , a)
        k = MatMul (e, v)  n = Tanh (k)  y = Mul (n, p)
    """,
    "a scan": """
        e, q = Scan <num_scan_inputs = 1, scan_input_directions = [1],
            body = inner (float[N, 3] d, float[N, 3] g) => (float[N, 3] f, float[N, 3] h) {
                j = MatMul (d, w)  l = Mul (j, g)  f = Tanh (l)  h = Mul (f, b)
            }> (a, x)
        zero = Constant <value_ints = [0]> ()  r = ReduceMean <keepdims = 0> (q, zero)
        k = MatMul (e, v)  u = Add (k, r)  n = Tanh (u)  y = Mul (n, p)
    """,
    "an if": """
        size = ReduceSum <keepdims = 0> (a)  zero = Constant <value = float {0.0}> ()
        positive = Greater (size, zero)
        e = If (positive) <
            then_branch = one () => (float[N, 3] e1) { g1 = MatMul (a, w)  e1 = Mul (g1, b) },
            else_branch = two () => (float[N, 3] e2) { g2 = Mul (a, p)  e2 = MatMul (g2, v) }
        >
        u = Sub (e, b)  n = Tanh (u)  y = MatMul (n, v)
    """,
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("most", [0, 3])
def test_gradients_of_control_flow_in_a_loop(inner: str, most: int) -> None:
    hold_gradients(write_loop(READ + INNER[inner]), EVERY, most=most)


_FROM = "zero = Constant <value_ints = [0]> ()  ones = Constant <value_ints = [1]> ()  "
CHANGING = {
    "a loop of as many steps as there were before": """
        e, q = Loop <
            body = inner (int64 j, bool on, float[N, 3] d) => (bool off, float[N, 3] f, float[3] u)
            {
                off = Identity (on)  g = MatMul (d, w)  h = Add (g, b)  f = Tanh (h)
                u = ReduceSum <keepdims = 0> (f, zero)
            }
        > (i, , a)
        r = ReduceSum <keepdims = 0> (q, zero)
        k = MatMul (e, v)  t = Add (k, r)  n = Tanh (t)  y = Mul (n, p)
    """,
    "a loop that stops by itself": """
        seven = Constant <value_int = 7> ()  yes = Constant <value_int = 1> ()
        on1 = Cast <to = 9> (yes)
        e = Loop <body = inner (int64 j, bool on, float[N, 3] d) => (bool off, float[N, 3] f) {
            g = MatMul (d, w)  h = Mul (g, p)  f = Tanh (h)
            size = ReduceSumSquare <keepdims = 0> (f)  least = Constant <value = float {0.4}> ()
            off = Greater (size, least)
        }> (seven, on1, b)
        u = Add (e, a)  k = MatMul (u, v)  n = Tanh (k)  y = Mul (n, p)
    """,
    "a slice that grows": """
        next = Add (i, ones)  part = Slice (x, zero, next, zero)  m = Mul (part, p)  t = Tanh (m)
        r = ReduceSum <keepdims = 0> (t, zero)  k = MatMul (a, v)  u = Add (k, r)
        h = MatMul (u, w)  n = Tanh (h)  y = Mul (n, p)
    """,
    "a product over a slice that grows": """
        next = Add (i, ones)  part = Slice (x, zero, next, zero)  m = MatMul (part, w)  t = Tanh (m)
        r = ReduceSum <keepdims = 0> (t, zero)  k = MatMul (a, v)  u = Add (k, r)
        n = Tanh (u)  y = Mul (n, p)
    """,
    "numbers chosen by their signs": """
        none = Constant <value = float {0.0}> ()  f = Greater (b, none)  places = NonZero (f)
        turned = Transpose (places)  m = MatMul (a, w)  part = GatherND (m, turned)
        t = Exp (part)  r = ReduceSum <keepdims = 0> (t)  k = MatMul (a, v)  u = Add (k, r)
        n = Tanh (u)  y = Mul (n, p)
    """,
}


@pytest.mark.parametrize("most", [0, 4])
@pytest.mark.parametrize("step", CHANGING)
def test_gradients_of_a_loop_in_which_shapes_change(step: str, most: int) -> None:
    """What has another shape in each iteration cannot be stacked for the gradient."""
    hold_gradients(write_loop(f"{READ}{_FROM}{CHANGING[step]}"), EVERY, most=most)
