"""Running sums and products: held against numpy in every direction, with zeros among them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.partitioner.graphs.accumulations import Line, accumulate
from splitonnx.partitioner.graphs.builders import NodeBuilder

DOUBLE = ir.TensorType(ir.DataType.DOUBLE)


def run_accumulate(
    kind: str, x: np.ndarray, axis: int, *, reverse: bool = False, exclusive: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Return what the nodes compute and the operators among them."""
    source = ir.Value(name="x", type=DOUBLE, shape=ir.Shape(x.shape))
    builder = NodeBuilder("sum")
    line = Line(axis=axis, rank=x.ndim, length=x.shape[axis], reverse=reverse)
    made = accumulate(
        builder,
        "Add" if kind == "Add" else "Mul",
        source,
        line,
        exclusive=exclusive,
    )
    result = builder.op("Identity", made)
    result.type = DOUBLE
    graph = ir.Graph([source], [result], nodes=builder.nodes, opset_imports={"": 18}, name="g")
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    return np.asarray(found), [node.op_type for node in builder.nodes]


def refer(
    kind: str, x: np.ndarray, axis: int, *, reverse: bool = False, exclusive: bool = False
) -> np.ndarray:
    """Accumulate with numpy."""
    turned = np.flip(x, axis) if reverse else x
    total = np.cumsum(turned, axis) if kind == "Add" else np.cumprod(turned, axis)
    if exclusive:
        first = np.full_like(np.take(total, [0], axis), 0.0 if kind == "Add" else 1.0)
        rest = np.take(total, range(x.shape[axis] - 1), axis)
        total = np.concatenate([first, rest], axis)
    return np.flip(total, axis) if reverse else total


@pytest.mark.parametrize("kind", ["Add", "Mul"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
def test_it_is_numpys_running_sum_and_product(
    kind: str, axis: int, reverse: bool, exclusive: bool
) -> None:
    x = np.random.default_rng(0).uniform(0.5, 1.5, (3, 7, 4))
    found, _ = run_accumulate(kind, x, axis, reverse=reverse, exclusive=exclusive)
    expected = refer(kind, x, axis, reverse=reverse, exclusive=exclusive)
    np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_zero_does_no_harm_to_the_products_before_it(exclusive: bool) -> None:
    x = np.array([[2.0, 3.0, 0.0, 5.0, 0.0]])
    found, _ = run_accumulate("Mul", x, 1, exclusive=exclusive)
    np.testing.assert_array_equal(found, refer("Mul", x, 1, exclusive=exclusive))


@pytest.mark.parametrize(("length", "steps"), [(1, 0), (2, 1), (3, 2), (8, 3), (9, 4), (100, 7)])
def test_the_steps_are_the_logarithm_of_the_length(length: int, steps: int) -> None:
    x = np.arange(1.0, length + 1)
    found, operators = run_accumulate("Add", x, 0)
    np.testing.assert_array_equal(found, np.cumsum(x))
    assert operators.count("Add") == operators.count("Pad") == steps


@pytest.mark.parametrize("kind", ["Add", "Mul"])
def test_one_element_excluded_from_its_own_line_leaves_the_neutral_one(kind: str) -> None:
    found, operators = run_accumulate(kind, np.array([[4.0], [6.0]]), 1, exclusive=True)
    assert "Pad" not in operators  # that of ONNX Runtime 1.19.2 leaves memory unwritten here
    np.testing.assert_array_equal(found, np.full((2, 1), 0.0 if kind == "Add" else 1.0))
