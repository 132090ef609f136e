"""Step functions let values pass and stop gradients."""

from __future__ import annotations

import pytest

from tests.partitioner.rewrites.elementwise import draw, weigh
from tests.support.derivatives import assert_differentiable
from tests.support.zoo import Net


@pytest.mark.parametrize("kind", ["Ceil", "Floor", "Hardmax", "Round", "Sign"])
def test_a_step_function_stops_gradients_but_not_values(kind: str) -> None:
    net = Net()
    step = net.op(kind, weigh(net, 5), out="step")
    net.op("Mul", step, net.constant("v", draw(0.5, 2, 5)), out="y")
    assert_differentiable(net, {"x": draw(-3, 3, 4, 5)})
