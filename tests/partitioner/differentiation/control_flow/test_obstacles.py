"""What no gradient can pass through, and what is said of it."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from splitonnx.errors import NotDifferentiable
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.differentiation.control_flow.obstacles import (
    find_obstacle,
    list_undifferentiable,
)
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.partitions import cut

_MODEL = """
<ir_version: 9, opset_import: ["" : 18]>
loops (float[N, 3] x, int64 most) => (float[N, 3] y) <
    float[3, 3] w0 = {1, 0, 2, 0, 1, 0, 3, 0, 1}, float[3, 3] w = {1, 2, 0, 0, 1, 0, 0, 4, 1},
    float[3] scale = {1, 2, 1}, float[3] bias = {0, 1, 0}, float[3] mean = {0.5, 0, 1},
    float[3] var = {1, 2, 1}
> {
    s = MatMul (x, w0)
    BODY
    y = MatMul (last, w0)
}
"""
_LOOP = """
    last = Loop <
        body = step (int64 i, bool going, float[M, 3] a) => (bool again, float[M, 3] n) {
            again = Identity (going)  k = MatMul (a, w)  STEP
        }
    > (most, , s)
"""
_NUMBERS = "half = Constant <value = float {0.5}> ()  zero = Constant <value = uint8 {0}> ()  "
_VIEW = "open = Constant <value_ints = [-1]> ()  rows = Constant <value_ints = [-1, 3]> ()  "
_YES = "yes = Constant <value = bool {1}> ()  "


def write(step: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(_MODEL.replace("BODY", _LOOP).replace("STEP", step))


def find_node(model: onnx.ModelProto) -> ir.Node:
    graph = prepare(open_model(model)).training.graph
    return next(node for node in graph if node.op_type in ("If", "Loop"))


OBSTACLES = {
    "n = Concat <axis = 0> (k, a)": "the shape of 'a'",
    f"{_VIEW}d = Concat <axis = 0> (k, a)  n = Reshape (d, rows)": "the shape of 'a'",
    f"{_NUMBERS}{_YES}n = Dropout (k, half, yes)": "'n' (Dropout) in its body draws",
    "q = SequenceConstruct (k, a)  n = SequenceAt (q, i)":
        "'q' (SequenceConstruct) in its body makes a sequence",
    "r = RandomNormalLike (k)  n = Add (k, r)": "'r' (RandomNormalLike) in its body draws",
    "n, m2, v2 = BatchNormalization <training_mode = 1> (k, scale, bias, mean, var)":
        "'n' (BatchNormalization) in its body is in training mode",
    f"{_NUMBERS}q = QuantizeLinear (k, half, zero)  n = DequantizeLinear (q, half, zero)":
        "'q' (QuantizeLinear) in its body rounds to integers",
    """size = ReduceMax <keepdims = 0> (k)  z = Constant <value = float {0}> ()
        up = Greater (size, z)  n = If (up) <
            then_branch = one () => (float[M, 3] n1) { r = RandomNormalLike (k)  n1 = Add (k, r) },
            else_branch = two () => (float[M, 3] n2) { n2 = Neg (k) }
        >""": "in 'n' (If) inside",
}  # fmt: skip
FINE = {
    "a view as it was": f"{_VIEW}n = Reshape (k, rows)",
    "a view as one row, and back": f"{_VIEW}f = Reshape (k, open)  t = Tanh (f)  "
    "n = Reshape (t, rows)",
    "a view to sizes that are joined": f"{_VIEW}three = Constant <value_ints = [3]> ()  "
    "joined = Concat <axis = 0> (open, three)  n = Reshape (k, joined)",
    "a view to sizes that are read": f"{_VIEW}d = Shape <start = 1> (k)  "
    "joined = Concat <axis = 0> (open, d)  t = Transpose (k)  n = Reshape (t, joined)",
    "products": "n = Tanh (k)",
    "a Dropout in inference mode": "n = Dropout (k)",
    "a BatchNormalization in inference mode": "n = BatchNormalization (k, scale, bias, mean, var)",
}


@pytest.mark.parametrize("step", OBSTACLES)
def test_a_loop_that_cannot_be_differentiated_is_refused_with_the_reason(step: str) -> None:
    reason = OBSTACLES[step]
    assert reason in str(find_obstacle(find_node(write(step))))
    with pytest.raises(NotDifferentiable) as caught:
        cut(write(step), at=None, loss="mse")
    assert (caught.value.node, caught.value.operator) == ("last", "Loop")
    assert reason in str(caught.value)
    assert "--freeze" in str(caught.value)


@pytest.mark.parametrize("step", FINE.values(), ids=list(FINE))
def test_a_loop_that_can_be_differentiated_is_cut(step: str) -> None:
    assert find_obstacle(find_node(write(step))) is None
    cut(write(step), at=None, loss="mse")


@pytest.mark.parametrize("most", ["", "ages"])
@pytest.mark.parametrize("step", ["n = Identity (a)", "n = Tanh (k)"])
def test_a_loop_that_never_ends_is_refused(step: str, most: str) -> None:
    text = _MODEL.replace("BODY", _LOOP).replace("STEP", step)
    ages = f"{_YES}ages = Constant <value_int = {2**60}> ()  last = Loop"
    text = text.replace("last = Loop", ages).replace("(most, , s)", f"({most}, yes, s)")
    model = onnx.parser.parse_model(text)
    with pytest.raises(NotDifferentiable, match=r"no iteration changes its condition"):
        cut(model, at=None, loss="mse")


SEQUENCES = """
    empty = SequenceEmpty <dtype = 1> ()
    all = Loop <
        body = step (int64 i, bool going, seq(float[M, 3]) a) => (bool again, seq(float[M, 3]) n) {
            again = Identity (going)  k = MatMul (s, w)  n = SequenceInsert (a, k)
        }
    > (most, , empty)
    last = ConcatFromSequence <axis = 0> (all)
"""


def test_a_loop_that_carries_a_sequence_is_refused() -> None:
    model = onnx.parser.parse_model(_MODEL.replace("BODY", SEQUENCES))
    with pytest.raises(NotDifferentiable, match="'empty' is not a tensor, but a sequence"):
        cut(model, at=None, loss="mse")


def test_weights_of_a_body_are_trained_unless_no_gradient_can_pass_through_it() -> None:
    inside = "own = Constant <value = float[3] {0.5, 1.0, 2.0}> ()  j = Mul (k, own)  "
    kept = prepare(open_model(write(f"{inside}n = Tanh (j)")))
    assert "own" in kept.trainable
    returned = prepare(open_model(write(f"{inside}n = Concat <axis = 0> (j, a)")))
    assert "own" not in returned.roles


def test_running_statistics_in_a_body_are_not_trained() -> None:
    prepared = prepare(open_model(write(FINE["a BatchNormalization in inference mode"])))
    assert {"scale", "bias"} <= set(prepared.trainable)
    assert not {"mean", "var"} & set(prepared.trainable)


def test_a_loop_that_no_trained_value_reaches_is_no_obstacle() -> None:
    graph = prepare(open_model(write("n = Concat <axis = 0> (k, a)"))).training.graph
    assert [fault.node for fault in list_undifferentiable(graph, ["w"], ["y"])] == ["last"]
    assert not list(list_undifferentiable(graph, ["w"], []))
    assert not list(list_undifferentiable(graph, [], ["y"]))


CHAIN = """
    first = Loop <
        body = one (int64 i, bool going, float[M, 3] a) => (bool again, float[M, 3] n) {
            again = Identity (going)  k = MatMul (a, w)  n = Tanh (k)
        }
    > (most, , s)
    bent = Relu (first)
    last = Loop <
        body = two (int64 i, bool going, float[M, 3] a) => (bool again, float[M, 3] n) {
            again = Identity (going)  k = Mul (a, scale)  n = Add (k, bent)
        }
    > (most, , bent)
"""


def test_what_a_loop_carries_to_its_end_has_a_shape_and_can_be_cut_at() -> None:
    model = onnx.parser.parse_model(_MODEL.replace("BODY", CHAIN))
    prepared = prepare(open_model(model))
    values = map_values(prepared.training.graph)
    assert [str(values[name].shape) for name in ("first", "last")] == ["[N,3]", "[N,3]"]
    for at in ("first", "bent"):  # ``bent`` is read in a body as well
        cut(model, at=[at, "most"], loss="mse", freeze=["^w0$"])
