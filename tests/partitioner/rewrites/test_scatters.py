"""Scatters with a reduction: gradients to data and updates, with places that stand twice."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.derivatives import assert_differentiable, close_net, draw_labels, take_step
from tests.support.zoo import Net

REDUCTIONS = ["none", "add", "mul", "max", "min"]
DATA = {"x": np.random.default_rng(0).uniform(0.5, 2.0, (3, 4, 5)).astype(np.float32)}


def scatter(net: Net, kind: str, reduction: str, *, twice: bool) -> None:
    random = np.random.default_rng(1)
    data = net.op("Mul", "x", net.weight("w", 4, 5), out="data")
    if kind == "ScatterElements":
        columns = [0, 3, 0, 3, 1] if twice else [0, 3, 4, 2, 1]
        places = np.tile(np.array(columns), (3, 4, 1))
        v, attributes = random.uniform(0.5, 2, (3, 4, 5)), {"axis": -1}
    else:
        places = np.array([[0, 1], [2, 3], [0, 1] if twice else [1, 1]])
        v, attributes = random.uniform(0.5, 2, (3, 5)), {}
    net.constant("v", v.astype(np.float32))
    updates = net.op("Mul", "v", "v", out="updates")
    net.op(
        kind, data, net.constant("i", places), updates, out="y", reduction=reduction, **attributes
    )


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["ScatterElements", "ScatterND"])
def test_a_batch_of_any_size(kind: str, reduction: str, twice: bool) -> None:
    if twice and reduction == "none":
        return  # the standard forbids it
    net = Net()
    scatter(net, kind, reduction, twice=twice)
    assert_differentiable(net, DATA)


@pytest.mark.parametrize("zeros", [1, 2])
def test_factors_that_are_zero(zeros: int) -> None:
    net = Net()
    data = net.op("Mul", "x", net.weight("w", 5), out="data")
    net.constant("v", np.array([[0.0] * zeros + [2.0] * (3 - zeros)], np.float32))
    net.op("ScatterElements", data, net.constant("i", np.array([[1, 1, 1]])), "v", out="y",
           axis=1, reduction="mul")  # fmt: skip
    assert_differentiable(net, {"x": np.ones((1, 5), np.float32)})


def test_what_ties_shares_the_gradient_and_what_is_infinite_loses_nothing() -> None:
    net = Net()
    low = net.constant("low", np.full((1, 3), -np.inf, np.float32))
    net.constant("v", np.array([[2.0, 2.0, 1.0, 3.0]], np.float32))
    places = net.constant("i", np.array([[0, 0, 0, 2]]))
    net.op("Mul", low, "x", out="data")
    net.op("ScatterElements", "data", places, "v", out="s", axis=1, reduction="max")
    net.op("Slice", "s", *(net.constant(n, np.array([v])) for n, v in zip("abcd", (0, 3, 1, 2),
           strict=True)), out="y")  # fmt: skip
    model = close_net(net, {"x": np.ones((1, 3), np.float32)})
    data = {"x": np.ones((1, 3), np.float32)}
    pull = np.array([2.0, 3.0]) - draw_labels(model, data)[0]
    for found in take_step(model, data):
        expected = [pull[0] / 2, pull[0] / 2, 0.0, pull[1]]
        np.testing.assert_allclose(found["v_grad"][0], expected, rtol=1e-5)
