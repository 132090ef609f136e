"""Slices of one row in Loops, whose gradients are held against differences of the model."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from splitonnx.errors import NotDifferentiable, StageFailed
from splitonnx.partitioner.differentiation.control_flow.single_rows import check_single_rows
from splitonnx.partitioner.graphs.traversals import list_bodies
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from tests.support.derivatives import draw_labels, hold_steps, take_step
from tests.support.fused_models import draw, run_stock

_MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
loops (float[N, 3] x, int64 most) => (float[N, 3] y) {
    s = MatMul (x, w)
    zero = Constant <value_ints = [0]> ()  one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()  last = Constant <value_ints = [-1]> ()
    scalar = Constant <value_int = 1> ()  go = Cast <to = 9> (scalar)
    y = Loop <
        body = step (int64 i, bool going, float[N, 3] a) => (bool again, float[N, 3] n) {
            again = Identity (going)  k = MatMul (a, w)  STEP
        }
    > (most, go, s)
}
"""
_FROM = "j = Add (i, scalar)  start = Reshape (i, last)  end = Unsqueeze (j, zero)  "
SLICES = {
    "a row": f"{_FROM}r = Slice (table, start, end, zero)  n = Add (k, r)",
    "a row, without axes": f"{_FROM}r = Slice (table, start, end)  n = Add (k, r)",
    "a row, with a step": f"{_FROM}r = Slice (table, start, end, zero, one)  n = Add (k, r)",
    "a row after another": "start = Add (i, one)  end = Add (two, i)  "
    "r = Slice (table, start, end, zero)  n = Add (k, r)",
    "a row before another": "end = Add (one, i)  start = Sub (end, one)  "
    "r = Slice (table, start, end, zero)  n = Add (k, r)",
    "a column": f"{_FROM}r = Slice (x, start, end, last)  t = Tanh (r)  n = Mul (k, t)",
}
BRANCH = f"""{_FROM} size = ReduceSum <keepdims = 0> (k)
    none = Constant <value = float {{0}}> ()  up = Greater (size, none)
    n = If (up) <
        then_branch = then () => (float[N, 3] b) {{
            r = Slice (table, start, end, zero)  b = Add (k, r) }},
        else_branch = other () => (float[N, 3] c) {{ c = Tanh (k) }}
    >"""


def write(step: str, rows: int = 5) -> onnx.ModelProto:
    model = onnx.parser.parse_model(_MODEL.replace("STEP", step))
    for name, array in {"w": draw(3, 3), "table": draw(rows, 3)}.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


@pytest.mark.parametrize("kind", SLICES)
def test_gradients_pass_through_a_loop_that_adds_a_slice_of_one_row(kind: str) -> None:
    model, data = write(SLICES[kind]), {"x": draw(4, 3), "most": np.array(3)}
    trained = ["w"] if kind == "a column" else ["w", "table"]
    labels = draw_labels(model, data)
    steps = take_step(model, data, trained)
    hold_steps(steps, model, "mse", {**data, "labels": labels}, trained)


def test_a_slice_in_a_branch_is_replaced_as_well() -> None:
    model = ir.from_proto(write(BRANCH))
    infer_shapes(model)
    loop = next(node for node in model.graph if node.op_type == "Loop")
    assert all(check_single_rows(body) for body in list_bodies(loop))
    kinds = [node.op_type for node in model.graph.all_nodes()]
    assert kinds.count("Slice") == 0
    data = {"x": draw(4, 3), "most": np.array(3)}
    (expected,), (found,) = run_stock(write(BRANCH), data), run_stock(ir.to_proto(model), data)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_row_that_does_not_exist_is_refused_in_the_run() -> None:
    """ONNX Runtime adds no rows to one row, and the Loop carries a tensor without elements then."""
    model, data = write(SLICES["a row"], rows=2), {"x": draw(1, 3), "most": np.array(3)}
    assert run_stock(model, data)[0].shape == (0, 3)
    client = Client(cut(model, at=None, loss="mse").client)
    assert next(client.predict_batches([{**data, "most": np.array(2)}]))["y"].shape == (1, 3)
    with pytest.raises(StageFailed, match=r"'r/row/\d+_Gather' \(Gather\) fails"):
        next(client.predict_batches([data]))


@pytest.mark.parametrize(
    "step",
    [
        "start = Reshape (i, last)  end = Add (start, two)  "
        "r = Slice (table, start, end, zero)  n = Add (k, r)",
        "start = Reshape (i, last)  end = Add (start, start)  "
        "r = Slice (table, start, end, zero)  n = Add (k, r)",
        f"{_FROM}r = Slice (table, start, end, zero, two)  n = Add (k, r)",
        f"{_FROM}r = Slice (table, start, end, zero)  q = Squeeze (r, zero)  n = Add (k, q)",
    ],
)
def test_other_slices_are_left_as_they_are(step: str) -> None:
    model = ir.from_proto(write(step))
    infer_shapes(model)
    loop = next(node for node in model.graph if node.op_type == "Loop")
    assert not any(check_single_rows(body) for body in list_bodies(loop))


def test_a_loop_that_adds_another_slice_is_refused() -> None:
    step = "start = Reshape (i, last)  end = Add (start, start)  "
    step += "r = Slice (table, start, end, zero)  n = Add (k, r)"
    with pytest.raises(NotDifferentiable, match="the shape of 'a', which it carries, may differ"):
        cut(write(step), at=None, loss="mse")


@pytest.mark.parametrize(("first", "is_there"), [(-3, True), (-2, True), (-4, False), (-6, False)])
def test_a_row_counted_from_the_end_is_the_same(first: int, is_there: bool) -> None:
    """A Slice from -1 to 0 is empty, where a Gather of -1 would read the last row."""
    shift = f"first = Constant <value_int = {first}> ()  f = Add (i, first)  "
    step = f"{shift}start = Reshape (f, last)  end = Add (start, one)  "
    model = write(f"{step}r = Slice (table, start, end, zero)  n = Add (k, r)", rows=5)
    data = {"x": draw(1, 3), "most": np.array({-3: 2, -2: 1, -4: 4, -6: 1}[first])}
    (expected,) = run_stock(model, data)
    client = Client(cut(model, at=None, loss="mse").client)
    if is_there:
        found = next(client.predict_batches([data]))["y"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert expected.shape == (0, 3)
        with pytest.raises(StageFailed, match=r"'r/row/\d+_Gather' \(Gather\) fails"):
            next(client.predict_batches([data]))


def test_a_loop_of_which_the_shapes_are_known_is_left_as_it_is() -> None:
    """Rows that do not exist do no harm where each step sums them."""
    sums = f"{_FROM}r = Slice (table, start, end, zero)  "
    sums += "q = ReduceSum <keepdims = 0> (r, zero)  n = Add (k, q)"
    model, data = write(sums, rows=2), {"x": draw(4, 3), "most": np.array(3)}
    (expected,) = run_stock(model, data)
    client = Client(cut(model, at=None, loss="mse").client)
    found = next(client.predict_batches([data]))["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
