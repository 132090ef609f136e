"""Outputs that gradients read, and the gradients of nodes in bodies that lack them."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from splitonnx.partitioner.differentiation.derived.kept_outputs import name_kept_outputs
from tests.partitioner.differentiation.control_flow.loop_models import write_if, write_loop
from tests.partitioner.differentiation.control_flow.scan_models import hold_gradients, write_scan

EVERY = ["s", "x", "w", "v", "p"]
LABELS = "labels = Constant <value = int64[2] {2, 0}> ()  "
NODES = {
    "a layer norm": "f = LayerNormalization (a, p)",
    "a layer norm with a bias that is trained": "axis = Constant <value_ints = [0]> ()  "
    "bias = ReduceSum <keepdims = 0> (w, axis)  f = LayerNormalization (a, p, bias)",
    "a cross-entropy": f"{LABELS}l = SoftmaxCrossEntropyLoss (a, labels)  f = Mul (a, l)",
    "a weighted cross-entropy that ignores a label": f"{LABELS}"
    "each = Constant <value = float[3] {2.0, 0.4, 1.3}> ()  "
    "l = SoftmaxCrossEntropyLoss <ignore_index = 0> (a, labels, each)  f = Mul (a, l)",
    "a cross-entropy whose log-probabilities are read": f"{LABELS}"
    "l, e = SoftmaxCrossEntropyLoss (a, labels)  g = Mul (a, l)  f = Add (g, e)",
}
REST = "  m = MatMul (f, w)  k = Gemm (b, v)  t = Add (m, k)  n = Tanh (t)  y = Mul (n, p)"


def build(kind: str) -> ir.Node:
    x, scale = ir.Value(name="x"), ir.Value(name="s")
    return ir.node(kind, [x, scale], outputs=[ir.Value(name="y")])


def test_what_gradients_read_is_named_where_it_is_not() -> None:
    node = build("LayerNormalization")
    other = ir.node("Relu", [node.outputs[0]], outputs=[ir.Value(name="z")])
    inputs = [value for value in node.inputs if value is not None]
    graph = ir.Graph(inputs, other.outputs, nodes=[node, other], opset_imports={"": 18})
    assert name_kept_outputs(graph)
    assert not name_kept_outputs(graph)
    assert [v.name for v in node.outputs] == ["y", "y#mean", "y#inv_std"]
    assert [v.name for v in other.outputs] == ["z"]


def test_outputs_that_have_a_name_keep_it() -> None:
    node = build("SoftmaxCrossEntropyLoss")
    node.resize_outputs(2)
    node.outputs[1].name = "given"
    graph = ir.Graph([], node.outputs, nodes=[node], opset_imports={"": 18})
    assert not name_kept_outputs(graph)
    assert [v.name for v in node.outputs] == ["y", "given"]


@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("node", NODES)
def test_gradients_in_a_loop(node: str, most: int) -> None:
    hold_gradients(write_loop(f"b = Gather (x, i)  {NODES[node]}{REST}"), EVERY, most=most)


@pytest.mark.parametrize("node", NODES)
def test_gradients_in_a_scan(node: str) -> None:
    hold_gradients(write_scan(f"{NODES[node]}{REST}"), EVERY)


@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("node", NODES)
def test_gradients_in_a_branch(node: str, condition: bool) -> None:
    then = f"{NODES[node]}  m1 = MatMul (f, w)  y1 = Tanh (m1)  z1 = Mul (a, p)"
    other = "m2 = MatMul (a, v)  y2 = Sigmoid (m2)  z2 = Mul (m2, p)"
    hold_gradients(write_if(then, other), ["s", "w", "v", "p"], condition=condition)


def test_gradients_in_a_loop_in_a_loop() -> None:
    inner = """
        two = Constant <value_int = 2> ()
        e = Loop <body = inner (int64 j, bool on, float[N, 3] d) => (bool off, float[N, 3] h) {
            off = Identity (on)  g = LayerNormalization (d, p)  l = MatMul (g, w)  h = Tanh (l)
        }> (two, , a)
        k = MatMul (e, v)  t = Add (k, b)  n = LayerNormalization (t, p)  y = Mul (n, p)
    """
    hold_gradients(write_loop(f"b = Gather (x, i)  {inner}"), EVERY)
