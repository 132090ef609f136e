"""Reductions and running ones: every way to give axes, ties, zeros, dynamic lengths, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.partitions import cut
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import assert_differentiable, close_net, take_step
from tests.support.zoo import INT64, Net

KINDS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
REDUCTIONS = [f"Reduce{kind}" for kind in KINDS]


def draw(low: float, high: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(4).uniform(low, high, shape).astype(np.float32)


DATA = {"x": draw(0.5, 2, 3, 4, 5)}


def weigh(net: Net) -> str:
    return net.op("Mul", "x", net.constant("w", draw(0.5, 1.5, 4, 5)), out="h")


def ints(net: Net, name: str, values: object) -> str:
    return net.constant(name, np.array(values, np.int64))


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [None, [], [1], [-1], [0], [0, 2], [-1, -3], [2, 1, 0]])
def test_reductions_along_any_axes_of_a_dynamic_batch(
    kind: str, keepdims: int, axes: list[int] | None
) -> None:
    net = Net()
    inputs = [weigh(net)] if axes is None else [weigh(net), ints(net, "axes", axes)]
    net.op(kind, *inputs, out="y", keepdims=keepdims)
    assert_differentiable(net, DATA)


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("given", [False, True])
def test_a_reduction_over_no_axes_still_does_the_rest_of_its_work(kind: str, given: bool) -> None:
    net = Net()
    inputs = [weigh(net), *([ints(net, "axes", [])] if given else [])]
    net.op(kind, *inputs, out="y", noop_with_empty_axes=1)
    assert_differentiable(net, DATA)


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reductions_before_their_axes_became_inputs(kind: str) -> None:
    old, new = Net(opset=11), Net()
    old.op(kind, weigh(old), out="y", axes=[1, -1], keepdims=0)
    new.op(kind, weigh(new), ints(new, "axes", [1, -1]), out="y", keepdims=0)
    expected = take_step(close_net(new, DATA), DATA)
    for found, right in zip(take_step(close_net(old, DATA), DATA), expected, strict=True):
        np.testing.assert_allclose(found["w_grad"], right["w_grad"], rtol=1e-6)


def find_gradients(net: Net, parameter: np.ndarray, output: str, x: np.ndarray) -> list[np.ndarray]:
    """Return the gradient of sum(x * output) to the parameter ``p``, on both targets."""
    net.constant("p", parameter)
    product = net.op("Mul", output, "x", out="product")
    net.op("ReduceSum", product, out="total", keepdims=0)
    model = close_net(net, {"x": x}, "total")
    return [
        run_step(cut(model, at=None, loss="from-model", client_target=target), {"x": x})["p_grad"]
        for target in TARGETS
    ]


@pytest.mark.parametrize("kind", ["ReduceMax", "ReduceMin"])
def test_elements_that_tie_share_the_gradient(kind: str) -> None:
    sign = 1 if kind == "ReduceMax" else -1
    values = sign * np.array([[1, 3, 3, 0], [2, 2, 2, 1], [5, 4, -np.inf, -np.inf]], "f")
    net = Net()
    net.op(kind, "p", ints(net, "axes", [1]), out="y", keepdims=1)
    for gradient in find_gradients(net, values, "y", np.full((3, 1), 6, "f")):
        np.testing.assert_array_equal(gradient, [[0, 3, 3, 0], [2, 2, 2, 0], [6, 0, 0, 0]])


def test_not_a_number_comes_through_an_extreme() -> None:
    net = Net()
    net.op("ReduceMax", weigh(net), ints(net, "axes", [1]), out="y")
    broken = DATA["x"].copy()
    broken[1, 2, 3] = np.nan
    model = close_net(net, DATA)
    labels = np.zeros((3, 1, 5), np.float32)
    for target in TARGETS:
        bundle = cut(model, at=None, loss="mse", client_target=target)
        assert np.isnan(run_step(bundle, {"x": broken, "labels": labels})["loss"])


def test_a_product_has_gradients_where_factors_are_zero() -> None:
    values = np.array([[2, 3, 4], [0, 3, 4], [0, 0, 4], [0, 0, 0]], "f")
    net = Net()
    net.op("ReduceProd", "p", ints(net, "axes", [1]), out="y")
    for gradient in find_gradients(net, values, "y", np.ones((4, 1), "f")):
        np.testing.assert_array_equal(gradient, [[12, 8, 6], [12, 0, 0], [0, 0, 0], [0, 0, 0]])


def test_a_product_of_an_unknown_number_of_factors_some_of_them_zero() -> None:
    net = Net()
    net.op("ReduceProd", weigh(net), ints(net, "axes", [0]), out="y")
    x = DATA["x"].copy()
    x[1, 2] = 0
    x[2, 2, 0] = 0
    assert_differentiable(net, {"x": x})


def test_small_factors_whose_product_vanishes_keep_their_gradients() -> None:
    values = np.full((1, 2), 1e-30, "f")
    net = Net()
    net.op("ReduceProd", "p", ints(net, "axes", [1]), out="y")
    for gradient in find_gradients(net, values, "y", np.ones((1, 1), "f")):
        np.testing.assert_allclose(gradient, values)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_running_sums(axis: int, exclusive: int, reverse: int) -> None:
    net = Net()
    net.op(
        "CumSum", weigh(net), net.constant("axis", np.array(axis)), out="y",
        exclusive=exclusive, reverse=reverse,
    )  # fmt: skip
    assert_differentiable(net, DATA)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_running_products_with_a_zero_among_them(axis: int, exclusive: int, reverse: int) -> None:
    net = Net(opset=26)
    net.op(
        "CumProd", weigh(net), net.constant("axis", np.array(axis)), out="y",
        exclusive=exclusive, reverse=reverse,
    )  # fmt: skip
    x = DATA["x"].copy()
    x[1, 2] = 0
    assert_differentiable(net, {"x": x})


@pytest.mark.parametrize(("axis", "shape"), [(0, (7,)), (-1, (1, 6))])
def test_running_sums_of_a_row(axis: int, shape: tuple[int, ...]) -> None:
    net = Net()
    net.op("CumSum", net.weight("w", *shape), net.constant("axis", np.array(axis)), out="sums")
    net.op("Mul", "sums", "x", out="y")
    assert_differentiable(net, {"x": draw(0.5, 2, 3, shape[-1])})


@pytest.mark.parametrize("kind", ["CumSum", "CumProd"])
@pytest.mark.parametrize("reverse", [0, 1])
def test_one_element_that_its_own_line_excludes_leaves_the_neutral_one(
    kind: str, reverse: int
) -> None:
    """ONNX Runtime's Pad leaves memory unwritten where it takes away all there was."""
    net = Net(opset=26)
    net.weight("w", 3, 1)
    axis = net.constant("axis", np.array(1))
    net.op(kind, "w", axis, out="excluded", exclusive=1, reverse=reverse)
    net.op("Add", "excluded", "w", out="shifted")
    net.op("Mul", "shifted", "x", out="y")
    assert_differentiable(net, {"x": draw(0.5, 2, 3, 1)})


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_greatest_elements_pass_gradients(largest: int, axis: int) -> None:
    net = Net()
    node = helper.make_node(
        "TopK", [weigh(net), ints(net, "k", [2])], ["y", "places"],
        axis=axis, largest=largest,
    )  # fmt: skip
    net.nodes.append(node)
    assert_differentiable(net, DATA)


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("offset", [None, -1, 2])
def test_triangles(upper: int, offset: int | None) -> None:
    net = Net()
    inputs = [] if offset is None else [ints(net, "k", offset)]
    net.op("Trilu", weigh(net), *inputs, out="y", upper=upper)
    assert_differentiable(net, DATA)


@pytest.mark.parametrize("kind", ["CumSum", "ReduceProd"])
def test_axes_that_are_computed_are_refused_by_name(kind: str) -> None:
    net = Net()
    axes = net.op("Cast", net.op("ReduceMax", "x", out="m", keepdims=0), out="axis", to=INT64)
    if kind == "ReduceProd":
        axes = net.op("Reshape", axes, ints(net, "one", [1]), out="axes")
    net.op("ReduceSum", net.op(kind, weigh(net), axes, out="y"), out="total", keepdims=0)
    model = close_net(net, DATA, "total")
    model.graph.output[0].type.tensor_type.shape.SetInParent()  # a scalar; onnx cannot tell
    with pytest.raises(UnsupportedModel, match=rf"'y_node' \({kind}\).*axes are computed"):
        cut(model, at=None, loss="from-model")
